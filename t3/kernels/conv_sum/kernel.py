"""`conv_sum` as one Triton kernel: each term is read once and each result written once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .naive import Doubled

# Numbers that a program holds at a time.
_BLOCK = 4096


@triton.jit(do_not_specialize=["height", "width", "row_odd", "col_odd"])
def _conv_sum(
    y,
    bias,
    by,
    gamma,
    total,
    normed,
    height,
    width,
    row_odd,
    col_odd,
    y_batch,
    y_row,
    y_col,
    by_batch,
    by_row,
    by_col,
    total_batch,
    total_row,
    total_col,
    normed_batch,
    normed_row,
    normed_col,
    root,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DOUBLED: tl.constexpr,
    BIAS: tl.constexpr,
    BY: tl.constexpr,
    TIMES: tl.constexpr,
    FRAME: tl.constexpr,
    REPEATS: tl.constexpr,
    TOTAL: tl.constexpr,
    NORMED: tl.constexpr,
    SILU: tl.constexpr,
):
    """One program: `BLOCK_W` pixels of a row with all their channels. Offsets that grow with the picture are 64-bit."""
    batch = (tl.program_id(1) // height).to(tl.int64)
    row = (tl.program_id(1) % height).to(tl.int64)
    col = (tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask = (col < width) & (channel < C)
    if DOUBLED:
        low, right = (row + row_odd) % 2, (col + col_odd) % 2
        half_row, half_col = (row + row_odd) // 2, (col + col_odd) // 2
        at = batch * y_batch + (half_row + low) * y_row + (half_col + right) * y_col + (2 * low + right) * C + channel
    else:
        at = batch * y_batch + row * y_row + col * y_col + channel
    x = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    if BY:
        if DOUBLED:
            dealt = (((channel * TIMES + FRAME) * 2 + low) * 2 + right) // REPEATS
            at = batch * by_batch + half_row * by_row + half_col * by_col + dealt
        else:
            at = batch * by_batch + row * by_row + col * by_col + channel
        x += tl.load(by + at, mask=mask, other=0.0).to(tl.float32)
    if TOTAL:
        at = batch * total_batch + row * total_row + col * total_col + channel
        tl.store(total + at, x.to(total.dtype.element_ty), mask=mask)
    if NORMED:
        length = tl.sqrt(tl.sum(x * x, axis=1))[:, None]
        x = x * (root / tl.maximum(length, 1e-12))
        x *= tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32)
        if SILU:
            x = x / (1 + tl.exp(-x))
        at = batch * normed_batch + row * normed_row + col * normed_col + channel
        tl.store(normed + at, x.to(normed.dtype.element_ty), mask=mask)


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
    """See `naive.conv_sum`. float16, bfloat16 or float32; what is written to has its channels last (stride 1), what is
    read had better."""
    target = total if total is not None else normed
    assert target is not None
    batch, channels, height, width = target.shape
    block = triton.next_power_of_2(channels)
    columns = max(1, _BLOCK // block)
    deal = doubled or Doubled(0, 0)
    repeats = 1 if by is None or doubled is None else channels * deal.times * 4 // by.shape[1]
    y, by = _channels_last(y), None if by is None else _channels_last(by)
    pictures = (y, by, total, normed)
    _conv_sum[(triton.cdiv(width, columns), height * batch)](
        y,
        bias,
        by,
        gamma,
        total,
        normed,
        height,
        width,
        deal.row,
        deal.col,
        *(stride for picture in pictures for stride in _strides(picture)),
        math.sqrt(channels),
        C=channels,
        BLOCK_C=block,
        BLOCK_W=columns,
        DOUBLED=doubled is not None,
        BIAS=bias is not None,
        BY=by is not None,
        TIMES=deal.times,
        FRAME=deal.frame,
        REPEATS=repeats,
        TOTAL=total is not None,
        NORMED=normed is not None,
        SILU=silu,
        num_warps=4,
    )


def _channels_last(picture: torch.Tensor) -> torch.Tensor:
    if _strided(picture):
        return picture
    return picture.contiguous(memory_format=torch.channels_last)


def _strides(picture: torch.Tensor | None) -> tuple[int, int, int]:
    """Of batch, row and column."""
    if picture is None:
        return 0, 0, 0
    assert _strided(picture), "channels are last here"
    return picture.stride(0), picture.stride(2), picture.stride(3)


def _strided(picture: torch.Tensor) -> bool:
    return picture.stride(1) == 1 or picture.shape[1] == 1
