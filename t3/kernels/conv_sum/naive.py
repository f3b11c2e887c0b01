"""`conv_sum` in plain torch, for any device and dtype: the truth that the Triton kernel is tested against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Numbers worked on at a time: what is held of them in float32 stays small (and in a CPU's cache).
STRIP = {"cpu": 2**15}
_LONG_STRIP = 2**24


class Doubled(NamedTuple):
    """How a picture of twice the size lies in a convolution's result at the size it was made of.

    The result has one row and one column more than the pixels it came from, and in its channels those of four pixels:
    `[upper left, upper right, lower left, lower right]`. Pixel (2 i + p, 2 j + q) is at `[i + p, j + q]`.

    row, col: 1 if the picture's window begins at an odd row (column) of the doubled picture, else 0.
    times, frame: of what goes by the convolution, at half the size. Its channels are dealt out, with repetition, to
        (channel, frame, row parity, column parity) of `times` frames; this one is number `frame`.
    """

    row: int
    col: int
    times: int = 1
    frame: int = 0


def conv_sum(
    y: torch.Tensor,
    bias: torch.Tensor | None = None,
    by: torch.Tensor | None = None,
    doubled: Doubled | None = None,
    *,
    total: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    silu: bool = True,
) -> None:
    """What follows a convolution in Wan's VAEs: `x = y + bias + by` into `total`; RMS norm and SiLU of x into `normed`.

    Sums are made in float32 (float64 from float64), and rounded once, when they are written.

    Args:
        y: the convolution's result `[B, C, H, W]`, of which the first rows and columns are taken if it has more than
            are wanted. With `doubled`, `[B, 4 C, ...]`. If `bias` or `by` is given it is used up: its values are
            undefined afterwards.
        bias: `[C]`. by: what goes by the convolution, `[B, C, H, W]` or as `doubled` says; it may have more rows and
            columns too.
        total, normed: `[B, C, H, W]` to write to, either or both; any strides.
        gamma: `[C]` of the norm, `x / max(|x|, 1e-12) * sqrt(C) * gamma` over the channels. silu: whether SiLU follows.
    """
    target = total if total is not None else normed
    assert target is not None
    batch, channels, height, width = target.shape
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    rows = max(1, STRIP.get(y.device.type, _LONG_STRIP) // (batch * channels * width))
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        if doubled is None:
            x = y[:, :, strip, :width].to(wide)
        else:
            x = _undouble(y, target[:, :, strip], top, doubled).to(wide)
        if bias is not None:
            x.add_(bias.to(wide)[:, None, None])
        if by is not None and doubled is None:
            x.add_(by[:, :, strip, :width])
        elif by is not None and doubled is not None:
            _add_dealt(x, by, top, doubled)
        if total is not None:
            total[:, :, strip].copy_(x)
        if normed is not None:
            assert gamma is not None
            normed[:, :, strip].copy_(_norm(x, gamma, silu))


def dealt_channels(channels: int, into: int, doubled: Doubled, row: int, col: int) -> torch.Tensor:
    """For each of `channels` of a pixel of this parity, which of the `into` channels goes to it."""
    place = ((torch.arange(channels) * doubled.times + doubled.frame) * 2 + row) * 2 + col
    return place // (channels * doubled.times * 4 // into)


def _norm(x: torch.Tensor, gamma: torch.Tensor, silu: bool) -> torch.Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    x = (x * (math.sqrt(x.shape[1]) / length.clamp_min_(1e-12))).mul_(gamma.to(x.dtype)[:, None, None])
    return F.silu(x, inplace=True) if silu else x


def _undouble(y: torch.Tensor, like: torch.Tensor, top: int, doubled: Doubled) -> torch.Tensor:
    """The rows from `top` of the picture that `y` holds, of the shape of `like`."""
    x = y.new_empty(like.shape)
    channels = like.shape[1]
    for to, half, row, col in _parities(like, top, doubled):
        place = x[to]
        first = channels * (2 * row + col)
        from_rows, from_cols = half[0] + row, half[1] + col
        place.copy_(
            y[
                :,
                first : first + channels,
                from_rows : from_rows + place.shape[2],
                from_cols : from_cols + place.shape[3],
            ]
        )
    return x


def _add_dealt(x: torch.Tensor, by: torch.Tensor, top: int, doubled: Doubled) -> None:
    """Add to the rows from `top` what of `by` falls on them."""
    for to, half, row, col in _parities(x, top, doubled):
        place = x[to]
        dealt = by[:, :, half[0] : half[0] + place.shape[2], half[1] : half[1] + place.shape[3]]
        place += dealt.index_select(1, dealt_channels(x.shape[1], by.shape[1], doubled, row, col).to(by.device))


def _parities(x: torch.Tensor, top: int, doubled: Doubled) -> Iterator[tuple[tuple, tuple[int, int], int, int]]:
    """For each parity of a doubled row and column: where its pixels lie in `x`, which begins at row `top` of the
    window; the row and column, at half the size, that the first of them was made of; the parities."""
    height, width = x.shape[2:]
    for row in range(2):
        for col in range(2):
            up, left = (row - doubled.row - top) % 2, (col - doubled.col) % 2
            to = (..., slice(up, height, 2), slice(left, width, 2))
            yield to, ((top + up + doubled.row) // 2, (left + doubled.col) // 2), row, col
