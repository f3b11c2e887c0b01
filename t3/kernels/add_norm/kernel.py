"""`add_norm` as one Triton kernel: x and the update are read once, the new x and the norm are written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Channels of a warp. On an H100 half or twice as many are as fast; several tokens a program are slower
# (benchmarks/README.md).
CHANNELS = 512


@triton.jit
def _row(at, token, token_stride, channel, inside):
    return tl.load(at + token * token_stride + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _add_norm(
    x,
    into,
    update,
    gate,
    multiply,
    plus,
    out,
    tokens,
    eps,
    x_batch,
    x_token,
    into_batch,
    into_token,
    update_batch,
    update_token,
    update_channel,
    gate_batch,
    gate_token,
    multiply_batch,
    multiply_token,
    plus_batch,
    plus_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    MULTIPLY: tl.constexpr,
    ONE: tl.constexpr,
    PLUS: tl.constexpr,
):
    """One program: one token with all its channels. Offsets are 64-bit."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    x += batch * x_batch
    # All loads stand before the sums, where the program's threads wait for each other.
    y = _row(x, token, x_token, channel, inside)
    if ADD:
        step = _row(update + batch * update_batch, token, update_token, channel.to(tl.int64) * update_channel, inside)
    if GATE:
        g = _row(gate + batch * gate_batch, token, gate_token, channel, inside)
    if MULTIPLY:
        m = _row(multiply + batch * multiply_batch, token, multiply_token, channel, inside)
    if PLUS:
        p = _row(plus + batch * plus_batch, token, plus_token, channel, inside)
    if ADD:
        if GATE:
            step *= g
        new = (y + step).to(x.dtype.element_ty)
        tl.store(into + batch * into_batch + token * into_token + channel, new, mask=inside)
        # The norm is of what was stored, as if it were read again.
        y = new.to(tl.float32)
    if NORM:
        mean = tl.sum(y, axis=0) / WIDTH
        y = tl.where(inside, y - mean, 0.0)
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + eps)
        if MULTIPLY:
            y *= m + 1.0 if ONE else m
        if PLUS:
            y += p
        here = (batch * tokens + token) * WIDTH
        tl.store(out + here + channel, y.to(out.dtype.element_ty), mask=inside)


def _run(x, into, update, gate, normed, eps, multiply, plus, one, warps) -> torch.Tensor | None:
    batch, count, width = x.shape
    into = x if into is None else into
    block = triton.next_power_of_2(width)
    out = x.new_empty((batch, count, width)) if normed else None
    (gate, *gate_at), (multiply, *multiply_at), (plus, *plus_at) = (_spread(t, x) for t in (gate, multiply, plus))
    _add_norm[(count, batch)](
        x,
        into,
        update,
        gate,
        multiply,
        plus,
        out,
        count,
        eps,
        x.stride(0),
        x.stride(1),
        into.stride(0),
        into.stride(1),
        *((0, 0, 1) if update is None else update.stride()),
        *gate_at,
        *multiply_at,
        *plus_at,
        WIDTH=width,
        BLOCK=block,
        ADD=update is not None,
        GATE=gate is not None,
        NORM=normed,
        MULTIPLY=multiply is not None,
        ONE=one,
        PLUS=plus is not None,
        num_warps=warps or min(16, max(1, block // CHANNELS)),
    )
    return out


def _spread(t: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor | None, int, int]:
    """A tensor that is broadcast to x, with its strides of batch and token; 0 where it is the same for all."""
    if t is None:
        return None, 0, 0
    if t.stride(-1) != 1:
        t = t.contiguous()
    strides = t.expand(x.shape).stride()
    # A token of a size-1 axis has a stride of its own, which nothing needs.
    return t, strides[0], strides[1] if x.shape[1] > 1 else 0


def add_(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    *,
    warps: int | None = None,
) -> None:
    """See `naive.add_`; float16, bfloat16 or float32, last strides of x and into 1. warps change only the speed."""
    _run(x, into, update, gate, False, 0.0, None, None, False, warps)


def norm(
    x: torch.Tensor,
    eps: float,
    multiply: torch.Tensor | None,
    plus: torch.Tensor | None,
    one: bool,
    update: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    *,
    warps: int | None = None,
) -> torch.Tensor:
    """See `naive.norm`, after `naive.add_` of `update` and `gate` where `update` is given; as `add_` for the rest."""
    out = _run(x, into, update, gate, True, eps, multiply, plus, one, warps)
    assert out is not None
    return out
