"""`window_merge` in plain torch, for any device and dtype: the truth that the Triton kernel is tested against."""

from __future__ import annotations

import torch


def window_merge(
    parts: list[torch.Tensor], rows: list[torch.Tensor | None], batch: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """One grouping's rows in the order of the tokens, or the mean of two: their sum, rounded once, halved.

    parts: one or two `[batch * N, width]`, contiguous. rows: for each, the row where each token lies, int32
    `[batch, N]`, or None where it lies in its place. out: where to write `[batch, N, width]`, any strides but those of
    the channels; None: a new tensor. Returns it, in the parts' dtype.
    """
    placed = [x if at is None else x[at.flatten().long()] for x, at in zip(parts, rows, strict=True)]
    mean = placed[0] if len(placed) == 1 else (placed[0] + placed[1]) / 2
    mean = mean.unflatten(0, (batch, -1))
    return mean.clone() if out is None else out.copy_(mean)
