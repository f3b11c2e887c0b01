"""`window_group` in plain torch, for any device and dtype: the truth that the Triton kernel is tested against."""

from __future__ import annotations

import torch


def window_group(
    x: torch.Tensor,
    rows: list[torch.Tensor | None],
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """What stands between a projection and attention inside windows, for each grouping of the tokens.

    Computed in float32 (float64 from float64) and rounded once, when a result is written.

    Args:
        x: `[B, N, width]`, projected q, k or v, all heads side by side, any strides.
        rows: for each grouping, the row that each token goes to, int32 `[B, N]`, a permutation of `B * N` rows; None
            where the tokens stay in their order.
        weight: `[width]` of an RMS norm over the whole width, `x / sqrt(mean(x^2) + eps) * weight`; None: no norm.
        cos, sin: `[1 or B, N, head_dim / 2]`, the turn of each pair of neighbouring channels, the same for every head:
            (a, b) becomes (a cos - b sin, a sin + b cos). None: no rotation.

    Returns for each grouping `[B * N, width]` in x's dtype, contiguous.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if weight is not None:
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight.to(wide)
    if cos is not None and sin is not None:
        # [B, N, heads, pairs, 2]
        pairs = y.unflatten(-1, (-1, cos.shape[-1], 2))
        a, b = pairs.unbind(-1)
        c, s = cos.to(wide)[:, :, None], sin.to(wide)[:, :, None]
        y = torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(2)
    y = y.to(x.dtype).flatten(0, 1)
    results = []
    for to in rows:
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        out[slice(None) if to is None else to.flatten().long()] = y
        results.append(out)
    return results
