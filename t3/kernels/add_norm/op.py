"""`add_norm` and `add_` as operators of torch's, so that compiled code holds them whole."""

from __future__ import annotations

import torch

from ...errors import T3Error
from ..namespace import own_namespace
from ..usable import triton_usable
from . import naive

_OURS = own_namespace(__name__)
Maybe = torch.Tensor | None


def add_norm(
    x: torch.Tensor,
    update: Maybe = None,
    gate: Maybe = None,
    *,
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
    into: Maybe = None,
) -> torch.Tensor:
    """Where `update` is given: x += gate * update IN PLACE (see `add_`). Then layer norm of x over its last axis.

    Args:
        x: `[B, n, dim]`, any float dtype; last stride 1, as in a chunk of a larger tensor. Its rows must not overlap.
        update, gate, into: see `add_`.
        scale, shift: modulation, y * (1 + scale) + shift; broadcastable to x (`[B, 1, dim]`, or per token
            `[B, n, dim]`), float32 or x's dtype. Either may be left out.
        weight, bias: affine, y * weight + bias, `[dim]` or as above. Not together with scale and shift.
        eps: added to the variance.

    Computed in float32 (float64 from float64), each result rounded once: x when it is stored, and the norm of what was
    stored. Hosts that round in between (ComfyUI rounds the norm and 1 + scale) differ by that much.
    By Triton where it serves, in plain torch elsewhere. Has no gradients. Returns `[B, n, dim]`, contiguous, x's dtype.
    Raises `T3Error` for shapes, dtypes or strides that do not fit, and where gradients are asked for.
    """
    if (scale is not None or shift is not None) and (weight is not None or bias is not None):
        raise T3Error("a layer norm takes scale and shift, or weight and bias, not both.")
    if gate is not None and update is None:
        raise T3Error("a gate was given without an update for it. Give update, or leave gate out.")
    if into is not None and update is None:
        raise T3Error("into was given without an update, and nothing is added. Give update, or leave into out.")
    _check(x, update, into, gate=gate, scale=scale, shift=shift, weight=weight, bias=bias)
    multiply, plus = (weight, bias) if scale is None and shift is None else (scale, shift)
    if update is None:
        return _norm(x, eps, multiply, plus, scale is not None)
    if into is not None:
        return _add_norm_into(x, into, update, gate, eps, multiply, plus, scale is not None)
    return _add_norm(x, update, gate, eps, multiply, plus, scale is not None)


def add_(x: torch.Tensor, update: torch.Tensor, gate: Maybe = None, *, into: Maybe = None) -> None:
    """x += gate * update IN PLACE, or x += update without a gate, computed in float32 and rounded once.

    x: `[B, n, dim]`, last stride 1. update: `[B, n, dim]`, x's dtype, any strides, in no memory of x's.
    gate: broadcastable to x (`[B, 1, dim]` or `[B, n, dim]`), float32 or x's dtype. As `add_norm` for the rest.
    into: where the sum goes instead, x being left as it is; like x, in no memory of x's or update's. The same to the
    bit as a copy of x that is added to, with x read once.
    """
    _check(x, update, into, gate=gate)
    if into is None:
        _add(x, update, gate)
    else:
        _add_into(x, into, update, gate)


def _check(x: torch.Tensor, update: Maybe, into: Maybe = None, **others: Maybe) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, update, *others.values())):
        raise T3Error("add_norm has no gradients. Run it under torch.no_grad(), or use torch's own layer norm and sum.")
    if x.ndim != 3 or not x.is_floating_point():
        raise T3Error(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; expected [B, n, dim] of a float dtype.")
    if x.stride(2) != 1:
        raise T3Error(f"x has strides {x.stride()}, and is written in place; its channels must lie side by side.")
    if into is not None and (into.shape != x.shape or into.dtype != x.dtype or into.stride(2) != 1):
        raise T3Error(
            f"into is {tuple(into.shape)} {into.dtype} with strides {into.stride()}; expected {tuple(x.shape)} "
            f"{x.dtype}, as x has, channels side by side."
        )
    if update is not None and (update.shape != x.shape or update.dtype != x.dtype):
        raise T3Error(f"update is {tuple(update.shape)} {update.dtype}; expected {tuple(x.shape)} {x.dtype}, as x has.")
    for name, t in others.items():
        if t is None:
            continue
        shape = (1,) * (3 - t.ndim) + tuple(t.shape)
        if (
            len(shape) > 3
            or shape[2] != x.shape[2]
            or any(n not in (1, m) for n, m in zip(shape, x.shape, strict=True))
        ):
            raise T3Error(f"{name} has shape {tuple(t.shape)}; expected one that is broadcast to {tuple(x.shape)}.")
        if t.dtype not in (x.dtype, torch.float32):
            raise T3Error(f"{name} has dtype {t.dtype}; expected {x.dtype} or torch.float32.")


@torch.library.custom_op(f"{_OURS}::norm", mutates_args=())
def _norm(x: torch.Tensor, eps: float, multiply: Maybe, plus: Maybe, one: bool) -> torch.Tensor:
    if not triton_usable(x.device, x.dtype):
        return naive.norm(x, eps, multiply, plus, one)
    from .kernel import norm

    return norm(x, eps, multiply, plus, one)


@torch.library.custom_op(f"{_OURS}::add_norm", mutates_args=("x",))
def _add_norm(
    x: torch.Tensor, update: torch.Tensor, gate: Maybe, eps: float, multiply: Maybe, plus: Maybe, one: bool
) -> torch.Tensor:
    if not triton_usable(x.device, x.dtype):
        naive.add_(x, update, gate)
        return naive.norm(x, eps, multiply, plus, one)
    from .kernel import norm

    return norm(x, eps, multiply, plus, one, update, gate)


@torch.library.custom_op(f"{_OURS}::add_norm_into", mutates_args=("into",))
def _add_norm_into(
    x: torch.Tensor,
    into: torch.Tensor,
    update: torch.Tensor,
    gate: Maybe,
    eps: float,
    multiply: Maybe,
    plus: Maybe,
    one: bool,
) -> torch.Tensor:
    if not triton_usable(x.device, x.dtype):
        naive.add_(x, update, gate, into)
        return naive.norm(into, eps, multiply, plus, one)
    from .kernel import norm

    return norm(x, eps, multiply, plus, one, update, gate, into)


@torch.library.custom_op(f"{_OURS}::add_", mutates_args=("x",))
def _add(x: torch.Tensor, update: torch.Tensor, gate: Maybe) -> None:
    if not triton_usable(x.device, x.dtype):
        return naive.add_(x, update, gate)
    from .kernel import add_ as by_triton

    return by_triton(x, update, gate)


@torch.library.custom_op(f"{_OURS}::add_into", mutates_args=("into",))
def _add_into(x: torch.Tensor, into: torch.Tensor, update: torch.Tensor, gate: Maybe) -> None:
    if not triton_usable(x.device, x.dtype):
        return naive.add_(x, update, gate, into)
    from .kernel import add_ as by_triton

    return by_triton(x, update, gate, into)


@_norm.register_fake
def _(x, eps, multiply, plus, one):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_norm.register_fake
def _(x, update, gate, eps, multiply, plus, one):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add.register_fake
def _(x, update, gate):
    return None


@_add_norm_into.register_fake
def _(x, into, update, gate, eps, multiply, plus, one):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_into.register_fake
def _(x, into, update, gate):
    return None
