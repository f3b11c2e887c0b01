"""T3 straight from a block's projections by our kernels, where they can be used: norm, rotation and windows in one."""

from __future__ import annotations

from typing import Any

import torch

from ..t3 import Partition
from ..t3.fused import attention_from_projections, norm_weight, refusal
from .forward_pass import ForwardPass


def refused(attn: Any, x: torch.Tensor, freqs: torch.Tensor, current: ForwardPass, patches: Any) -> str | None:
    """Why the kernels are not to be used for this block, in words; None if they are.

    attn: the host's self-attention module; x: its input `[B, N, dim]`; freqs: the host's rotations; patches: those that
    want to see q and k.
    """
    if patches:
        return "a patch of another node wants to see queries and keys"
    if not all(isinstance(norm, (torch.nn.RMSNorm, torch.nn.Identity)) for norm in (attn.norm_q, attn.norm_k)):
        return f"its norm is a {type(attn.norm_q).__name__}"
    if freqs.ndim != 6 or freqs.shape[1:3] != (x.shape[1], 1) or freqs.shape[4:] != (2, 2):
        return f"its rotations have the shape {tuple(freqs.shape)}"
    beside = x.shape[1] - current.layout.grid.tokens
    return refusal(x, prefix=current.layout.prefix, suffix=beside - current.layout.prefix, memory=current.memory)


def attend(
    attn: Any, x: torch.Tensor, freqs: torch.Tensor, current: ForwardPass, partition: Partition, backend: Any
) -> torch.Tensor:
    """The windows of this block, `[B, N, dim]`, before its output projection."""
    plain = isinstance(attn.norm_q, torch.nn.Identity)
    return attention_from_projections(
        attn.q(x),
        attn.k(x),
        attn.v(x),
        current.layout.grid,
        partition,
        heads=attn.num_heads,
        norms=None if plain else (norm_weight(attn.norm_q, x), norm_weight(attn.norm_k, x)),
        eps=0.0 if plain else _eps(attn.norm_q, x),
        turns=(freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]),
        backend=backend,
    )


def _eps(norm: Any, x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
