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
    inverse: torch.Tensor | None = None,
    *,
    outs: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """What stands between a projection and attention inside windows, for each grouping of the tokens.

    Computed in float32 (float64 from float64) and rounded once, when a result is written.

    Args:
        x: `[B, N, width]`, projected q, k or v, all heads side by side, any strides. Or some tokens of it only, or
            some of its heads; then `rows`, `cos` and `sin`, or `weight`, are those tokens' and heads' too.
        rows: for each grouping, the row that each token goes to, int32 `[B, N]`; None where the tokens stay in their
            order. For all tokens they are a permutation of `B * N` rows.
        weight: `[width]` of an RMS norm over the whole width, `x / sqrt(mean(x^2) + eps) * weight`; None: no norm.
        cos, sin: `[1 or B, N, head_dim / 2]`, the turn of each pair of neighbouring channels, the same for every head:
            (a, b) becomes (a cos - b sin, a sin + b cos). None: no rotation.
        inverse: float32 `[B, N]`, `1 / sqrt(mean(x^2) + eps)` of heads beyond those in `x` too, to be used as it is.
        outs: for each grouping where to write: `[B * N, width]`, or `[B, N, width]` where tokens stay in their order;
            any strides but those of the channels. One grouping whose tokens stay, normed or turned, may also be
            `[B, N, ranks, groups, width / ranks / groups]`, any strides but the last. None: new tensors.

    Returns for each grouping `[B * N, width]` in x's dtype, contiguous, or `outs`.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if weight is not None:
        if inverse is None:
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight.to(wide)
        else:
            y = y * inverse[..., None].to(wide) * weight.to(wide)
    if cos is not None and sin is not None:
        # [B, N, heads, pairs, 2]
        pairs = y.unflatten(-1, (-1, cos.shape[-1], 2))
        a, b = pairs.unbind(-1)
        c, s = cos.to(wide)[:, :, None], sin.to(wide)[:, :, None]
        y = torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(2)
    y = y.to(x.dtype)
    if outs is None:
        outs = [x.new_empty((y.shape[0] * y.shape[1], y.shape[2])) for _ in rows]
    for out, to in zip(outs, rows, strict=True):
        if to is not None:
            out[to.flatten().long()] = y.flatten(0, 1)
        else:
            out.copy_(y.view(out.shape) if out.ndim == 2 else y.unflatten(2, out.shape[2:]))
    return outs
