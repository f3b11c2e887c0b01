"""From a block's tokens to attention, the host's layers as `t3.block` and `t3.fused` take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..t3 import Partition
from ..t3.block import Projections, Windows
from ..t3.block import attend as attend_by_chunks
from ..t3.fused import attention_from_projections, norm_weight
from ..t3.memory import Share
from .forward_pass import ForwardPass
from .lend import linear


def refused(attn: Any, tokens: int, freqs: torch.Tensor, patches: Any) -> str | None:
    """Why norm and rotation of this block must be left to the host's code, in words; None if they need not.

    attn: the host's self-attention module; tokens: of its input; freqs: the host's rotations; patches: those that want
    to see q and k.
    """
    if patches:
        return "a patch of another node wants to see queries and keys"
    if not all(isinstance(norm, (torch.nn.RMSNorm, torch.nn.Identity)) for norm in (attn.norm_q, attn.norm_k)):
        return f"its norm is a {type(attn.norm_q).__name__}"
    if freqs.ndim != 6 or freqs.shape[1:3] != (tokens, 1) or freqs.shape[4:] != (2, 2):
        return f"its rotations have the shape {tuple(freqs.shape)}"
    return None


def attend(
    attn: Any,
    x: torch.Tensor,
    tokens: Callable[[slice], torch.Tensor],
    freqs: torch.Tensor,
    current: ForwardPass,
    partition: Partition,
    backend: Any,
    chunks: Sequence[slice],
) -> torch.Tensor:
    """The windows of this block, `[B, N, dim]`, before its output projection, by chunks and groups of heads.

    x: a tensor `[B, N, dim]` like the module's input; tokens: of some tokens, that input.
    """
    projections = Projections(
        shape=(x.shape[0], x.shape[1], attn.num_heads * attn.head_dim),
        like=x,
        tokens=tokens,
        q=linear(attn.q, x),
        k=linear(attn.k, x),
        v=linear(attn.v, x),
        heads=attn.num_heads,
        **_norms_and_turns(attn, x, freqs),
    )
    windows = Windows(current.layout.grid, partition, backend, current.layout.prefix)
    share = current.share if projections.in_parts else Share(current.share.heads)
    return attend_by_chunks(projections, windows, share, chunks)


def attend_compiled(
    attn: Any, x: torch.Tensor, freqs: torch.Tensor, current: ForwardPass, partition: Partition, backend: Any
) -> torch.Tensor:
    """The same of the module's whole input `x`, in few operations that torch.compile takes whole."""
    layout = current.layout
    return attention_from_projections(
        attn.q(x),
        attn.k(x),
        attn.v(x),
        layout.grid,
        partition,
        heads=attn.num_heads,
        prefix=layout.prefix,
        suffix=x.shape[1] - layout.grid.tokens - layout.prefix,
        backend=backend,
        **_norms_and_turns(attn, x, freqs),
    )


def _norms_and_turns(attn: Any, x: torch.Tensor, freqs: torch.Tensor) -> dict[str, Any]:
    plain_norm = isinstance(attn.norm_q, torch.nn.Identity)
    return {
        "norms": None if plain_norm else (norm_weight(attn.norm_q, x), norm_weight(attn.norm_k, x)),
        "eps": 0.0 if plain_norm else _eps(attn.norm_q, x),
        "turns": (freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]),
    }


def _eps(norm: Any, x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
