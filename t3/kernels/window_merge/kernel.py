"""`window_merge` as one Triton kernel: each row is read once and each result written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of a program, where a call does not say: the fastest on an H100, see `python -m t3.bench kernels`.
WARPS = 4
# Channels of a program, counted over all its tokens: one wide token or a few narrow ones.
MERGED = 2048


@triton.jit(do_not_specialize=["tokens"])
def _window_merge(
    one,
    two,
    rows_one,
    rows_two,
    out,
    tokens,
    out_batch,
    out_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TWO: tl.constexpr,
    MOVED_ONE: tl.constexpr,
    MOVED_TWO: tl.constexpr,
):
    """One program: `TOKENS` tokens of a sample at once. Offsets are 64-bit."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    channel = tl.arange(0, BLOCK)[None, :]
    inside = there[:, None] & (channel < WIDTH)
    here = batch * tokens + token
    at = here
    if MOVED_ONE:
        at = tl.load(rows_one + here, mask=there, other=0).to(tl.int64)
    x = tl.load(one + at[:, None] * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
    if TWO:
        at = here
        if MOVED_TWO:
            at = tl.load(rows_two + here, mask=there, other=0).to(tl.int64)
        x += tl.load(two + at[:, None] * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
        # One rounding after the halving, which is exact: the released code rounds the sum, then halves it.
        x *= 0.5
    place = out + batch * out_batch + token[:, None] * out_token + channel
    tl.store(place, x.to(out.dtype.element_ty), mask=inside)


def window_merge(
    parts: list[torch.Tensor],
    rows: list[torch.Tensor | None],
    batch: int,
    *,
    out: torch.Tensor | None = None,
    warps: int | None = None,
    tokens: int | None = None,
) -> torch.Tensor:
    """See `naive.window_merge`; float16, bfloat16, float32. warps, tokens: of a program; only speed depends on them."""
    rows_of_all, width = parts[0].shape
    count = rows_of_all // batch
    if out is None:
        out = parts[0].new_empty((batch, count, width))
    block = triton.next_power_of_2(width)
    at_once = triton.next_power_of_2(tokens or max(1, MERGED // block))
    _window_merge[triton.cdiv(count, at_once), batch](
        parts[0],
        parts[-1],
        rows[0],
        rows[-1],
        out,
        count,
        out.stride(0),
        out.stride(1),
        WIDTH=width,
        BLOCK=block,
        TOKENS=at_once,
        TWO=len(parts) == 2,
        MOVED_ONE=rows[0] is not None,
        MOVED_TWO=rows[-1] is not None,
        num_warps=warps or WARPS,
    )
    return out
