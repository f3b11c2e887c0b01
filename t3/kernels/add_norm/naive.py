"""`add_norm` in plain torch, for any device and dtype: the truth that the Triton kernel is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def wide(x: torch.Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def add_(
    x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None = None, into: torch.Tensor | None = None
) -> None:
    """x += gate * update in place, or x += update without a gate; rounded once.

    Args:
        x: `[B, n, dim]`, any strides.
        update: `[B, n, dim]`, any strides.
        gate: broadcastable to x (`[B, 1, dim]` or per token `[B, n, dim]`), x's dtype or float32.
        into: where the sum goes instead, x being left as it is: x's shape and dtype, any strides.
    """
    step = update.to(wide(x))
    (x if into is None else into).copy_(x.to(wide(x)) + (step if gate is None else step * gate.to(wide(x))))


def norm(
    x: torch.Tensor,
    eps: float,
    multiply: torch.Tensor | None,
    plus: torch.Tensor | None,
    one: bool,
) -> torch.Tensor:
    """Layer norm of x `[B, n, dim]` over its last axis, times `multiply` (plus 1 where `one`), plus `plus`.

    multiply, plus: broadcastable to x, x's dtype or float32. Returns a contiguous tensor in x's dtype, rounded once.
    """
    y = F.layer_norm(x.to(wide(x)), x.shape[-1:], eps=eps)
    if multiply is not None:
        y = y * (multiply.to(wide(x)) + 1 if one else multiply.to(wide(x)))
    if plus is not None:
        y = y + plus.to(wide(x))
    return y.to(x.dtype).contiguous()
