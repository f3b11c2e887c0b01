"""`window_merge` as one Triton kernel: each row is read once and each result written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of a program, where a call does not say: the fastest on an H100, see benchmarks/window_kernels.py.
WARPS, TOKENS = 4, 1


@triton.jit(do_not_specialize=["tokens"])
def _window_merge(
    one,
    two,
    rows_one,
    rows_two,
    out,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TWO: tl.constexpr,
    MOVED_ONE: tl.constexpr,
    MOVED_TWO: tl.constexpr,
):
    """One program: `TOKENS` tokens, of all samples counted through, one after the other. Offsets are 64-bit."""
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        at = token
        if MOVED_ONE:
            at = tl.load(rows_one + token).to(tl.int64)
        x = tl.load(one + at * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            at = token
            if MOVED_TWO:
                at = tl.load(rows_two + token).to(tl.int64)
            x += tl.load(two + at * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
            # One rounding after the halving, which is exact: the released code rounds the sum, then halves it.
            x *= 0.5
        tl.store(out + token * WIDTH + channel, x.to(out.dtype.element_ty), mask=inside)


def window_merge(
    parts: list[torch.Tensor],
    rows: list[torch.Tensor | None],
    batch: int,
    *,
    warps: int | None = None,
    tokens: int | None = None,
) -> torch.Tensor:
    """See `naive.window_merge`; float16, bfloat16, float32. warps, tokens: of a program; only speed depends on them."""
    tokens = tokens or TOKENS
    count, width = parts[0].shape
    out = torch.empty_like(parts[0])
    _window_merge[(triton.cdiv(count, tokens),)](
        parts[0],
        parts[-1],
        rows[0],
        rows[-1],
        out,
        count,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        TOKENS=tokens,
        TWO=len(parts) == 2,
        MOVED_ONE=rows[0] is not None,
        MOVED_TWO=rows[-1] is not None,
        num_warps=warps or WARPS,
    )
    return out.unflatten(0, (batch, -1))
