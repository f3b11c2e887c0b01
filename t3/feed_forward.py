"""A feed-forward layer with its GELU inside the first matrix product, or in place after it.

The hidden tensor is the largest of a block (11 GiB at 4K in a 1.3B): it is written once, and there is never a second.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from .errors import T3Error
from .kernels.namespace import own_namespace

log = logging.getLogger(__name__)
HALF = (torch.float16, torch.bfloat16)
# Lends weight and bias of a linear layer, as the layer would use them on x.
Lend = Callable[[nn.Module, torch.Tensor], AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]]
Layer = Callable[[torch.Tensor], torch.Tensor]
_checked: dict[tuple[torch.device, torch.dtype], str | None] = {}
# Where compiled code takes `linear_gelu`: elsewhere the compiler's own fusion is as good.
_COMPILED_ON = ("cuda",)


def feed_forward(x: torch.Tensor, up: nn.Module, down: Layer, lend: Lend | None = None) -> torch.Tensor:
    """down(gelu(up(x))), GELU in its tanh form, as Wan's blocks have it.

    x: `[..., dim]`; up, down: from `[..., dim]` to `[..., hidden]` and back, linear layers as a rule.
    lend: a host's way to lend weight and bias of a layer that casts or patches them at each call, see `legal`.

    See `gelu_of_linear` for what is done with the GELU.
    """
    return down(gelu_of_linear(x, up, lend))


def gelu_of_linear(x: torch.Tensor, up: nn.Module, lend: Lend | None = None) -> torch.Tensor:
    """gelu(up(x)), as `feed_forward` takes them.

    Where `legal` has nothing against it, the GELU is part of the matrix product, applied to its float32 sums; elsewhere
    `up` is called as it is and its result changed in place (out of place where gradients or hooks may need it).
    Compiled code holds both as one operator where `up` is a plain layer: a compiler would pass over it all once more.
    """
    if torch.compiler.is_compiling():
        return _linear_gelu(x, *_own(up)) if _is_operator(up, x) else F.gelu(up(x), approximate="tanh")
    if legal(up, x, lend) is not None:
        return _gelu(up(x), x, up)
    if lend is None or not _host_casts(up):
        return _fused(x, *_own(up))
    with lend(up, x) as (weight, bias):
        if _not_dense(x, weight, bias) is None:
            return _fused(x, weight, bias)
        return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate="tanh")


def legal(up: nn.Module, x: torch.Tensor, lend: Lend | None = None) -> str | None:
    """Why the GELU cannot be fused into `up(x)`, in words, or None if it can.

    It can where `up` does no more than `F.linear(x, weight, bias)`: a linear layer of torch's, or of ComfyUI's that
    neither casts nor patches its weights, or one that does where `lend` hands them out; without hooks, weights being
    ordinary tensors of x's dtype on x's device. And where this torch computes what it should, which is tried once.
    """
    if why := _not_for(x):
        return why
    if torch.is_autocast_enabled("cuda"):
        return "autocast chooses the dtypes"
    if _wants_gradients(up, x):
        return "it has no gradients"
    return _not_plain(up, lend) or _not_trusted(x.device, x.dtype) or _not_lent(up, x)


def _is_operator(up: nn.Module, x: torch.Tensor) -> bool:
    """Whether compiled code is to hold gelu(up(x)) as one operator. Asks nothing that tracing cannot answer."""
    if x.device.type not in _COMPILED_ON or torch.is_autocast_enabled(x.device.type) or _wants_gradients(up, x):
        return False
    return _not_plain(up, None) is None and _not_dense(x, *_own(up)) is None


@torch.library.custom_op(f"{own_namespace(__name__)}::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(F.linear(x, weight, bias)) in its tanh form, by the fused product where that is to be trusted."""
    if (_not_for(x) or _not_trusted(x.device, x.dtype)) is None:
        return _fused(x, weight, bias)
    return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate="tanh")


@_linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _not_for(x: torch.Tensor) -> str | None:
    """Why tensors like x have no fused product."""
    if x.device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA card, not {x.device}"
    return None if x.dtype in HALF else f"it takes float16 and bfloat16, not {x.dtype}"


def _wants_gradients(up: nn.Module, x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in up.parameters()))


def _not_plain(up: nn.Module, lend: Lend | None) -> str | None:
    """Why `up` is not known to be just a linear layer."""
    hooks = (up._forward_hooks, up._forward_pre_hooks, up._backward_hooks, up._backward_pre_hooks)
    if any(hooks):
        return "the layer has hooks"
    if "forward" in vars(up):
        return "the layer's forward is replaced"
    if not isinstance(up, nn.Linear) or not (type(up).forward is nn.Linear.forward or _is_host_s(up, "forward")):
        return f"{type(up).__name__} is no plain linear layer"
    if _host_casts(up) and (lend is None or not _is_host_s(up, "forward_comfy_cast_weights")):
        return "the layer's weights are cast or patched at each call"
    return None


def _is_host_s(up: nn.Module, method: str) -> bool:
    """Whether a method is that of ComfyUI's linear layer, not overridden by a subclass: that layer is torch's unless
    its weights are cast or patched at each call. By identity: while code is compiled, functions have other names."""
    ops = sys.modules.get("comfy.ops")
    return ops is not None and getattr(type(up), method, None) is getattr(ops.disable_weight_init.Linear, method)


def _host_casts(up: nn.Module) -> bool:
    """Whether ComfyUI makes this layer's weights anew at each call."""
    return any(bool(getattr(up, name, None)) for name in ("comfy_cast_weights", "weight_function", "bias_function"))


def _own(up: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert isinstance(up, nn.Linear)
    return up.weight, up.bias


def _not_lent(up: nn.Module, x: torch.Tensor) -> str | None:
    # What a host will lend is looked at when it is there.
    return None if _host_casts(up) else _not_dense(x, *_own(up))


def _not_dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why these tensors cannot go into the fused product as they are."""
    if bias is None:
        return "the layer has no bias"
    for t in (weight, bias):
        if type(t) not in (torch.Tensor, nn.Parameter):
            return f"the layer's weights are {type(t).__name__}s"
        if t.dtype != x.dtype or t.device != x.device or t.layout != torch.strided:
            return f"the layer's weights are {t.dtype} on {t.device}, and x is {x.dtype} on {x.device}"
    if x.shape[-1] != weight.shape[1]:
        raise T3Error(f"x has {x.shape[-1]} channels, and the layer takes {weight.shape[1]}.")
    return None


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert bias is not None
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)


def _gelu(hidden: torch.Tensor, x: torch.Tensor, up: nn.Module) -> torch.Tensor:
    """In place where nobody else can see it: no gradients, no hook or foreign forward that may have kept it, no memory
    of the input's."""
    seen = hidden.requires_grad or bool(up._forward_hooks) or "forward" in vars(up)
    if seen or hidden.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")


def _not_trusted(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this torch's fused product is not to be used on this device; tried once, and said once where it fails."""
    key = (device, dtype)
    if key not in _checked:
        if torch.cuda.is_current_stream_capturing():
            return "its first use needs a trial, which a CUDA graph cannot hold"
        _checked[key] = trial(device, dtype)
        if _checked[key]:
            log.warning("T3: GELU stays beside the matrix product on %s: %s.", device, _checked[key])
    return _checked[key]


@torch.inference_mode()
def trial(
    device: torch.device, dtype: torch.dtype, fused: Callable[..., torch.Tensor] = torch._addmm_activation
) -> str | None:
    """Whether `fused(bias, x, weight.t(), use_gelu=True)` is GELU in the tanh form: what is wrong with it, or None.

    torch documents no form. Its source has tanh on NVIDIA cards (cuBLASLt's epilogue, or `gelu_(..., "tanh")` after
    the product where cuBLASLt does not serve), and the exact one on the CPU; older CUDA had inaccurate epilogues.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, weight, bias = random(96, 128), random(64, 128) / 8, random(64)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")

    def error(y: torch.Tensor) -> float:
        return (y.double() - exact).norm().item()

    try:
        ours = error(fused(bias, x, weight.t(), use_gelu=True))
        # Between -4 and -1 both forms are small, so rounding does not hide what tells them apart. A product with the
        # identity is exact.
        z = torch.linspace(-4, -1, 64 * 64).to(device, dtype).view(64, 64)
        y = fused(torch.zeros_like(bias), torch.eye(64, device=device, dtype=dtype), z, use_gelu=True).double()
    except RuntimeError as failure:
        return f"torch's fused product fails ({str(failure).splitlines()[0]})"
    theirs = error(F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    if not ours <= 2 * theirs:
        return f"torch's fused product is {ours / theirs:.1f} times as far off as separate steps"
    off = {form: (y - F.gelu(z.double(), approximate=form)).norm().item() for form in ("tanh", "none")}
    return None if off["tanh"] < off["none"] else "torch's fused product has another form of GELU"
