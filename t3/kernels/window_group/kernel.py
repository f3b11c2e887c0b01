"""`window_group` as one Triton kernel: x and the turns are read once, each result is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of a program, where a call does not say: the fastest on an H100, see benchmarks/window_kernels.py.
WARPS, TOKENS = 4, 1


@triton.jit(do_not_specialize=["tokens"])
def _window_group(
    x,
    weight,
    cos,
    sin,
    rows_one,
    rows_two,
    out_one,
    out_two,
    tokens,
    eps,
    x_batch,
    x_token,
    cos_batch,
    cos_token,
    cos_pair,
    sin_batch,
    sin_token,
    sin_pair,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    TWO: tl.constexpr,
    MOVE_ONE: tl.constexpr,
    MOVE_TWO: tl.constexpr,
):
    """One program: `TOKENS` tokens, one after the other, with all their channels. Offsets are 64-bit.

    A token is held as `BLOCK_HEADS` heads of `BLOCK_HEAD` channels, powers of two: all heads meet the same turns, which
    are read once.
    """
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    channel = tl.arange(0, BLOCK_HEADS * BLOCK_HEAD)
    inside = channel < WIDTH
    if HEAD < BLOCK_HEAD:
        within = channel % BLOCK_HEAD
        channel = channel // BLOCK_HEAD * HEAD + within
        inside = (within < HEAD) & (channel < WIDTH)
    pair = tl.arange(0, BLOCK_HEAD // 2)
    turned = pair < HEAD // 2
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        # All loads stand before the sum, where the program's threads wait for each other.
        here = batch * tokens + token
        one, two = here, here
        if MOVE_ONE:
            one = tl.load(rows_one + here).to(tl.int64)
        if MOVE_TWO:
            two = tl.load(rows_two + here).to(tl.int64)
        y = tl.load(x + batch * x_batch + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)
        if TURN:
            at = cos + batch * cos_batch + token * cos_token + pair * cos_pair
            c = tl.load(at, mask=turned, other=0.0).to(tl.float32)[None, :]
            at = sin + batch * sin_batch + token * sin_token + pair * sin_pair
            s = tl.load(at, mask=turned, other=0.0).to(tl.float32)[None, :]
        if NORM:
            w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            y = y * tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + eps) * w
        if TURN:
            a, b = tl.split(tl.reshape(y, (BLOCK_HEADS, BLOCK_HEAD // 2, 2)))
            y = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK_HEADS * BLOCK_HEAD,))
        tl.store(out_one + one * WIDTH + channel, y.to(out_one.dtype.element_ty), mask=inside)
        if TWO:
            tl.store(out_two + two * WIDTH + channel, y.to(out_two.dtype.element_ty), mask=inside)


def window_group(
    x: torch.Tensor,
    rows: list[torch.Tensor | None],
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    warps: int | None = None,
    tokens: int | None = None,
) -> list[torch.Tensor]:
    """See `naive.window_group`; float16, bfloat16 or float32, one or two groupings.

    warps, tokens: of a program; only speed depends on them.
    """
    tokens = tokens or TOKENS
    batch, count, width = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    outs = [x.new_empty((batch * count, width)) for _ in rows]
    # Without turns there are no heads to tell apart.
    head = width if cos is None else 2 * cos.shape[2]
    grid = (triton.cdiv(count, tokens), batch)
    _window_group[grid](
        x,
        weight,
        cos,
        sin,
        rows[0],
        rows[-1],
        outs[0],
        outs[-1],
        count,
        eps,
        x.stride(0),
        x.stride(1),
        *_strides(cos),
        *_strides(sin),
        WIDTH=width,
        HEAD=head,
        BLOCK_HEADS=triton.next_power_of_2(width // head),
        BLOCK_HEAD=triton.next_power_of_2(head),
        TOKENS=tokens,
        NORM=weight is not None,
        TURN=cos is not None,
        TWO=len(rows) == 2,
        MOVE_ONE=rows[0] is not None,
        MOVE_TWO=rows[-1] is not None,
        num_warps=warps or WARPS,
    )
    return outs


def _strides(turns: torch.Tensor | None) -> tuple[int, int, int]:
    """Of batch, token and pair; one table serves every sample."""
    if turns is None:
        return 0, 0, 0
    return turns.stride(0) if turns.shape[0] > 1 else 0, turns.stride(1), turns.stride(2)
