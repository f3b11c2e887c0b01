"""`window_group` in Triton: x and the turns are read once, each result is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of a program, where a call does not say: the fastest on an H100, see `python -m t3.bench kernels`.
WARPS, TOKENS = 4, 1
# Channels of a program that only moves tokens, counted over all its tokens.
MOVED = 2048


@triton.jit(do_not_specialize=["tokens"])
def _window_group(
    x,
    weight,
    cos,
    sin,
    rows_one,
    rows_two,
    inverse,
    out_one,
    out_two,
    tokens,
    eps,
    x_batch,
    x_token,
    rows_batch,
    inverse_batch,
    one_batch,
    one_row,
    two_batch,
    two_row,
    cos_batch,
    cos_token,
    cos_pair,
    sin_batch,
    sin_token,
    sin_pair,
    piece_rank,
    piece_group,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    GIVEN: tl.constexpr,
    TURN: tl.constexpr,
    TWO: tl.constexpr,
    MOVE_ONE: tl.constexpr,
    MOVE_TWO: tl.constexpr,
    PIECE: tl.constexpr,
    GROUPS: tl.constexpr,
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
    place = channel
    if PIECE > 0:
        piece = (channel // PIECE).to(tl.int64)
        place = piece // GROUPS * piece_rank + piece % GROUPS * piece_group + channel % PIECE
    pair = tl.arange(0, BLOCK_HEAD // 2)
    turned = pair < HEAD // 2
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        # All loads stand before the sum, where the program's threads wait for each other.
        one, two = token, token
        if MOVE_ONE:
            one = tl.load(rows_one + batch * rows_batch + token).to(tl.int64)
        if MOVE_TWO:
            two = tl.load(rows_two + batch * rows_batch + token).to(tl.int64)
        y = tl.load(x + batch * x_batch + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)
        if TURN:
            at = cos + batch * cos_batch + token * cos_token + pair * cos_pair
            c = tl.load(at, mask=turned, other=0.0).to(tl.float32)[None, :]
            at = sin + batch * sin_batch + token * sin_token + pair * sin_pair
            s = tl.load(at, mask=turned, other=0.0).to(tl.float32)[None, :]
        if NORM:
            w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            if GIVEN:
                y = y * tl.load(inverse + batch * inverse_batch + token) * w
            else:
                y = y * tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + eps) * w
        if TURN:
            a, b = tl.split(tl.reshape(y, (BLOCK_HEADS, BLOCK_HEAD // 2, 2)))
            y = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK_HEADS * BLOCK_HEAD,))
        tl.store(out_one + batch * one_batch + one * one_row + place, y.to(out_one.dtype.element_ty), mask=inside)
        if TWO:
            at = out_two + batch * two_batch + two * two_row + channel
            tl.store(at, y.to(out_two.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _move(
    x,
    rows_one,
    rows_two,
    out_one,
    out_two,
    tokens,
    x_batch,
    x_token,
    rows_batch,
    one_batch,
    one_row,
    two_batch,
    two_row,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TWO: tl.constexpr,
    MOVE_ONE: tl.constexpr,
    MOVE_TWO: tl.constexpr,
):
    """The same without norm and turn: one program moves `TOKENS` tokens at once, a few narrow ones or a wide one."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    channel = tl.arange(0, BLOCK)[None, :]
    inside = there[:, None] & (channel < WIDTH)
    one, two = token, token
    if MOVE_ONE:
        one = tl.load(rows_one + batch * rows_batch + token, mask=there, other=0).to(tl.int64)
    if MOVE_TWO:
        two = tl.load(rows_two + batch * rows_batch + token, mask=there, other=0).to(tl.int64)
    y = tl.load(x + batch * x_batch + token[:, None] * x_token + channel, mask=inside, other=0.0)
    tl.store(out_one + batch * one_batch + one[:, None] * one_row + channel, y, mask=inside)
    if TWO:
        tl.store(out_two + batch * two_batch + two[:, None] * two_row + channel, y, mask=inside)


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
    warps: int | None = None,
    tokens: int | None = None,
) -> list[torch.Tensor]:
    """See `naive.window_group`; float16, bfloat16 or float32, one or two groupings.

    warps, tokens: of a program; only speed depends on them.
    """
    batch, count, width = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    if outs is None:
        outs = [x.new_empty((batch * count, width)) for _ in rows]
    common = {"WIDTH": width, "TWO": len(rows) == 2, "MOVE_ONE": rows[0] is not None, "MOVE_TWO": rows[-1] is not None}
    common["num_warps"] = warps or WARPS
    # Both groupings' rows lie alike.
    rows_batch = next((at.stride(0) for at in rows if at is not None), 0)
    to_one, to_two = _places(outs[0], rows[0], count), _places(outs[-1], rows[-1], count)
    # Pieces of the width that do not lie side by side; the constants of one piece change no other kernel.
    piece_rank, piece_group, groups, piece = 0, 0, 1, 0
    if outs[0].ndim == 5:
        (piece_rank, piece_group), (groups, piece) = outs[0].stride()[2:4], outs[0].shape[3:]
    if weight is None and cos is None:
        block = triton.next_power_of_2(width)
        at_once = triton.next_power_of_2(tokens or max(1, MOVED // block))
        _move[triton.cdiv(count, at_once), batch](
            x,
            rows[0],
            rows[-1],
            outs[0],
            outs[-1],
            count,
            x.stride(0),
            x.stride(1),
            rows_batch,
            *to_one,
            *to_two,
            BLOCK=block,
            TOKENS=at_once,
            **common,
        )
        return outs
    tokens = tokens or TOKENS
    # Without turns there are no heads to tell apart.
    head = width if cos is None else 2 * cos.shape[2]
    _window_group[triton.cdiv(count, tokens), batch](
        x,
        weight,
        cos,
        sin,
        rows[0],
        rows[-1],
        inverse,
        outs[0],
        outs[-1],
        count,
        eps,
        x.stride(0),
        x.stride(1),
        rows_batch,
        0 if inverse is None else inverse.stride(0),
        *to_one,
        *to_two,
        *_strides(cos),
        *_strides(sin),
        piece_rank,
        piece_group,
        PIECE=piece,
        GROUPS=groups,
        HEAD=head,
        BLOCK_HEADS=triton.next_power_of_2(width // head),
        BLOCK_HEAD=triton.next_power_of_2(head),
        TOKENS=tokens,
        NORM=weight is not None,
        GIVEN=inverse is not None,
        TURN=cos is not None,
        **common,
    )
    return outs


def _places(out: torch.Tensor, rows: torch.Tensor | None, count: int) -> tuple[int, int]:
    """Strides of sample and row: where tokens move, a row says all; else it is counted within its sample."""
    if out.ndim == 5:
        return out.stride(0), out.stride(1)
    if rows is not None:
        return 0, out.stride(-2)
    return (out.stride(0) if out.ndim == 3 else count * out.stride(0)), out.stride(-2)


def _strides(turns: torch.Tensor | None) -> tuple[int, int, int]:
    """Of batch, token and pair; one table serves every sample."""
    if turns is None:
        return 0, 0, 0
    return turns.stride(0) if turns.shape[0] > 1 else 0, turns.stride(1), turns.stride(2)
