"""`window_merge` in plain torch, for any device and dtype: the truth that the Triton kernel is tested against."""

from __future__ import annotations

import torch


def window_merge(parts: list[torch.Tensor], rows: list[torch.Tensor | None], batch: int) -> torch.Tensor:
    """One grouping's rows in the order of the tokens, or the mean of two: their sum, rounded once, halved.

    parts: one or two `[batch * N, width]`, contiguous. rows: for each, the row where each token lies, int32
    `[batch, N]`, or None where it lies in its place. Returns `[batch, N, width]` in their dtype, a tensor of its own.
    """
    placed = [x if at is None else x[at.flatten().long()] for x, at in zip(parts, rows, strict=True)]
    out = placed[0].clone() if len(placed) == 1 else (placed[0] + placed[1]) / 2
    return out.unflatten(0, (batch, -1))
