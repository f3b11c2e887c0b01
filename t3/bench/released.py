"""The released semantics as a peer, written here from what the authors' code does (see docs/fidelity.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends import Backend
from ..errors import T3Error

# Of [batch, t, t, h, h, w, w, heads, head_dim], each axis cut in two: where the windows' axes go.
_LOCAL, _STRIDED = (0, 1, 3, 5, 2, 4, 6, 7, 8), (0, 2, 4, 6, 1, 3, 5, 7, 8)


def released_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    partition: Sequence[int],
    *,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    turns: tuple[torch.Tensor, torch.Tensor],
    backend: Backend,
) -> torch.Tensor:
    """T3 self-attention step by step as released: RMS norm in float32, rotation in complex float64, both groupings
    attended always (also where they coincide), copies by rearranging, sum and half in the working dtype.

    q, k, v: projected, `[B, N, heads*head_dim]`; arguments as those of `t3.fused.attention_from_projections`.
    Raises `T3Error` where a count does not divide its axis: the released code cannot cut it.
    """
    if any(n % c for n, c in zip(grid, partition, strict=True)):
        raise T3Error(f"the released code needs counts that divide the grid {tuple(grid)}, not {tuple(partition)}.")
    turn = torch.complex(*(table.double() for table in turns))[:, :, None]

    def prepare(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight
        pairs = torch.view_as_complex(x.double().unflatten(-1, (heads, -1, 2)))
        return torch.view_as_real(pairs * turn).flatten(3).to(v.dtype)

    q, k, v = prepare(q, norms[0]), prepare(k, norms[1]), v.unflatten(-1, (heads, -1))
    head_dim = q.shape[-1]
    local = [y for n, c in zip(grid, partition, strict=True) for y in (c, n // c)]
    strided = [y for n, c in zip(grid, partition, strict=True) for y in (n // c, c)]
    total = None
    for order, split in ((_STRIDED, strided), (_LOCAL, local)):
        shape = (q.shape[0], *split, heads, head_dim)
        windows = [x.reshape(shape).permute(order).flatten(4, 6).flatten(0, 3) for x in (q, k, v)]
        out = backend.attend(windows[0], windows[1], windows[2], head_dim**-0.5)
        back = [order.index(i) for i in range(9)]
        out = out.reshape([shape[i] for i in order]).permute(back).reshape(q.shape)
        total = out if total is None else (total + out) / 2
    assert total is not None
    return total.flatten(2)
