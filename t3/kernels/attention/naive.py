"""T3 attention in float64, one window at a time: the readable truth that every faster path is tested against.

Written from the definition (arXiv 2512.13492, section 3) with plain loops, and sharing no code with `t3.windows`.
"""

from __future__ import annotations

import math
from itertools import product

import torch


def local_groups(length: int, count: int) -> list[list[int]]:
    """Positions of an axis in `count` contiguous blocks; the first `length % count` are one longer."""
    groups, start = [], 0
    for g in range(count):
        size = length // count + (1 if g < length % count else 0)
        groups.append(list(range(start, start + size)))
        start += size
    return groups


def strided_groups(length: int, count: int) -> list[list[int]]:
    """Positions of an axis in `count` residue classes: group g holds g, g + count, g + 2*count, ..."""
    return [list(range(g, length, count)) for g in range(count)]


def windows(grid, partition, axis_groups) -> list[list[int]]:
    """Token indices of every window of one grouping; `axis_groups` is `local_groups` or `strided_groups`."""
    _, height, width = grid
    per_axis = [axis_groups(length, count) for length, count in zip(grid, partition, strict=True)]
    return [[(t * height + h) * width + w for t, h, w in product(*groups)] for groups in product(*per_axis)]


def dense_attention(q, k, v, scale=None):
    """Softmax attention in float64. `[B, N, heads, head_dim]` for q, `[B, M, heads, head_dim]` for k and v."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weights = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * scale, dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def t3_attention_reference(q, k, v, grid, partition, *, prefix=0, scale=None):
    """`t3.t3_attention` by definition. Any dtype in, float64 out, same shape as q.

    Every window is attended in both groupings, whether they coincide or not; the result is their mean. Tokens before
    `prefix` and after the grid are keys of every window, and their own queries attend every token.
    """
    tokens = grid[0] * grid[1] * grid[2]
    globals_ = [*range(prefix), *range(prefix + tokens, q.shape[1])]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for axis_groups in (local_groups, strided_groups):
        for window in windows(grid, partition, axis_groups):
            rows = [prefix + i for i in window]
            keys = rows + globals_
            attended = dense_attention(q[:, rows], k[:, keys], v[:, keys], scale)
            out = out.index_add(1, torch.tensor(rows, device=q.device), attended / 2)
    if globals_:
        attended = dense_attention(q[:, globals_], k, v, scale)
        out = out.index_add(1, torch.tensor(globals_, device=q.device), attended)
    return out
