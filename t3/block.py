"""Attention of one block from its tokens, and the rest of the block, by chunks of tokens and groups of heads.

Nothing is held at its full size but the block's input, what becomes its output, and what `memory.Share` allows beside
them. The sums are those of the plain block. Hosts say what is computed for some tokens; how it is shared out is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention import t3_attention
from .backends import Backend
from .fused import attend_all, attend_groups, attend_windows, refusal, rows_around
from .kernels.window_group.op import window_group, window_group_into
from .kernels.window_merge.op import window_merge_into
from .memory import Share
from .plan import Grid, Partition
from .windows import token_rows

Turns = tuple[torch.Tensor, torch.Tensor]


class Linear(NamedTuple):
    """A projection: `call(x)`. `weight` and `bias` where it does no more than multiply by them and add: then some of
    its outputs can be had alone."""

    call: Callable[[torch.Tensor], torch.Tensor]
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def some(self, x: torch.Tensor, channels: slice | None) -> torch.Tensor:
        """All outputs, or those of `channels`."""
        if channels is None:
            return self.call(x)
        assert self.weight is not None
        return F.linear(x, self.weight[channels], None if self.bias is None else self.bias[channels])

    def some_into(self, x: torch.Tensor, channels: slice | None, out: torch.Tensor) -> None:
        """The same into `out`, `[B, n, outputs]`; by the matrix product itself, without a copy, where it can be."""
        if not self._direct(x, out):
            out.copy_(self.some(x, channels))
            return
        assert self.weight is not None and self.bias is not None
        some = slice(None) if channels is None else channels
        # What torch's own linear layer calls for such x, so that the result is the same to the bit.
        torch.addmm(self.bias[some], x.flatten(0, 1), self.weight[some].t(), out=out.flatten(0, 1))

    def _direct(self, x: torch.Tensor, out: torch.Tensor) -> bool:
        if self.weight is None or self.bias is None or torch.is_grad_enabled():
            return False
        tensors = (x, out, self.weight, self.bias)
        alike = all(t.dtype == x.dtype and t.device == x.device and t.is_contiguous() for t in tensors)
        return alike and not torch.is_autocast_enabled(x.device.type)


@dataclass(frozen=True)
class Projections:
    """What stands between a block's tokens and attention.

    shape: `[B, N, width]` of q, k and v; like: a tensor of their dtype on their device. tokens: of some tokens, what is
    projected, `[B, n, dim]`. norms: weights `[width]` of the RMS norms of q and k over the whole width, with `eps`.
    turns: see `fused.attention_from_projections`.
    """

    shape: tuple[int, int, int]
    like: torch.Tensor
    tokens: Callable[[slice], torch.Tensor]
    q: Linear
    k: Linear
    v: Linear
    heads: int
    norms: tuple[torch.Tensor, torch.Tensor] | None = None
    eps: float = 1e-6
    turns: Turns | None = None

    @property
    def in_parts(self) -> bool:
        """Whether projections can be made of some heads alone."""
        return all(linear.weight is not None for linear in (self.q, self.k, self.v))

    def empty(self, width: int) -> torch.Tensor:
        """A new `[B, N, width]`."""
        return self.like.new_empty((*self.shape[:2], width))

    def norm(self, which: int, channels: slice | None) -> torch.Tensor | None:
        """Norm weights of q (0), k (1) or v (2, which has none), of some channels or all."""
        if self.norms is None or which == 2:
            return None
        return self.norms[which] if channels is None else self.norms[which][channels]

    def turn(self, which: int, rows: slice) -> Turns | tuple[None, None]:
        """The turns of some tokens of q, k or v, which is not turned."""
        if self.turns is None or which == 2:
            return None, None
        cos, sin = self.turns
        return cos[:, rows], sin[:, rows]


@dataclass(frozen=True)
class Windows:
    """What is attended and by what. prefix: tokens before the grid, as in `t3_attention`; all others follow it."""

    grid: Grid
    partition: Partition
    backend: Backend
    prefix: int = 0


def attend(p: Projections, windows: Windows, share: Share, chunks: Sequence[slice]) -> torch.Tensor:
    """T3 self-attention before its output projection, `[B, N, width]`, a tensor of its own. No gradients.

    share: how the work is shared out; parts only where `p.in_parts`. chunks: slices that make up all tokens.
    """
    if share.heads is None and refusal(p.like) is None:
        return _attend_at_once(p, windows, chunks)
    head = p.shape[2] // p.heads
    parts = head_groups(p.heads, -(-p.heads // share.parts))
    some_heads = share.heads or p.heads
    inverses: list[torch.Tensor] | None = [] if len(parts) > 1 and p.norms else None
    widest = max(part.stop - part.start for part in parts) * head
    buffers = [p.empty(widest) for _ in range(3)]
    # The heads that have been attended leave their results in the place of their queries, if all queries are there.
    out = buffers[0] if len(parts) == 1 else p.empty(p.shape[2])
    for part in parts:
        whole = len(parts) == 1
        channels = None if whole else slice(part.start * head, part.stop * head)
        qkv = [x[..., : (part.stop - part.start) * head] for x in buffers]
        project(p, qkv, channels, inverses, chunks)
        for some in head_groups(part.stop - part.start, some_heads):
            here = slice(some.start * head, some.stop * head)
            there = slice((part.start + some.start) * head, (part.start + some.stop) * head)
            attend_heads([x[..., here] for x in qkv], windows, some.stop - some.start, out[..., there])
    return out


def by_chunks(out: torch.Tensor, chunks: Iterable[slice], work: Callable[[slice, torch.Tensor], None]) -> torch.Tensor:
    """`work(rows, slot)` for each chunk: `slot`, `[B, n, dim]`, is these tokens of `out` and is written over. It is
    contiguous where there is one sample. Returns `out`."""
    for rows in chunks:
        work(rows, out[:, rows])
    return out


def head_groups(count: int, most: int) -> list[slice]:
    """Slices of so many heads, of `most` each; the last may be smaller."""
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


def project(p: Projections, qkv: list, channels: slice | None, inverses: list | None, chunks: Sequence[slice]) -> None:
    """Fill `qkv` with q, k, v of all tokens in their order, normed and turned; all heads or those of `channels`.

    qkv: `[B, N, channels]` each, or `[B, N, ranks, groups, channels of each]`, any strides but the last.
    inverses: for q and k, 1 / sqrt(mean(x^2) + eps) over the whole width, `[B, N]`, which `channels` alone do not tell;
    an empty list is filled, from projections of all channels.
    """
    fill = inverses is not None and not inverses
    inverses = [] if inverses is None else inverses
    if fill:
        wide = torch.float64 if p.like.dtype == torch.float64 else torch.float32
        inverses += [p.like.new_empty(p.shape[:2], dtype=wide) for _ in range(2)]
    for rows in chunks:
        x = p.tokens(rows)
        for which, (linear, out) in enumerate(zip((p.q, p.k, p.v), qkv, strict=True)):
            norm, turns = p.norm(which, channels), p.turn(which, rows)
            if fill and norm is not None:
                whole = linear.call(x)
                length = torch.linalg.vector_norm(whole, dim=-1, dtype=wide)
                inverses[which][:, rows] = torch.rsqrt(length.square() / p.shape[2] + p.eps)
                y = whole[..., channels]
            elif norm is None and turns[0] is None and out.ndim == 3:
                linear.some_into(x, channels, out[:, rows])
                continue
            else:
                y = linear.some(x, channels)
            if norm is None and turns[0] is None:
                out[:, rows] = y.unflatten(2, out.shape[2:])
                continue
            inverse = inverses[which][:, rows] if inverses and norm is not None else None
            window_group_into(y, [out[:, rows]], [None], norm, p.eps, *turns, inverse)


def attend_heads(qkv: list[torch.Tensor], windows: Windows, heads: int, slot: torch.Tensor) -> None:
    """T3 attention of some heads, `[B, N, heads*head_dim]` each, normed and turned, into `slot`, which may be q.

    By our kernels where they serve, one grouping after the other, or in plain torch. No gradients.
    """
    work = _attend_heads_by_kernels if refusal(*qkv) is None else _attend_heads_plainly
    work(qkv, windows, heads, slot)


def _attend_heads_by_kernels(qkv: list[torch.Tensor], windows: Windows, heads: int, slot: torch.Tensor) -> None:
    batch, grid, partition, backend = slot.shape[0], windows.grid, windows.partition, windows.backend
    rows = list(token_rows(tuple(grid), tuple(partition), batch, slot.device))
    scale = heads**0.5 / math.sqrt(slot.shape[2])
    prefix, end = windows.prefix, windows.prefix + grid.tokens
    suffix = slot.shape[1] - end
    beside = [rows_around(x, prefix, suffix) for x in qkv[1:]] if prefix or suffix else None
    parts = []
    for at in rows:
        inside = (x[:, prefix:end] for x in qkv)
        grouped = [x.flatten(0, 1) if at is None else window_group(x, [at])[0] for x in inside]
        parts.append(attend_windows(grouped, grid, partition, batch, heads, backend, scale, beside))
        del grouped
    if beside is not None:
        alone = attend_all(rows_around(qkv[0], prefix, suffix), qkv[1], qkv[2], heads, backend, scale)
        slot[:, :prefix], slot[:, end:] = alone[:, :prefix], alone[:, prefix:]
    here = slot[:, prefix:end]
    if rows == [None]:
        here.copy_(parts[0].unflatten(0, (batch, -1)))
    else:
        window_merge_into(parts, rows, here)


def _attend_heads_plainly(qkv: list[torch.Tensor], windows: Windows, heads: int, slot: torch.Tensor) -> None:
    """The same in plain torch, on any device."""
    q, k, v = (x.unflatten(2, (heads, -1)) for x in qkv)
    memory = working_bytes(q, windows, heads)
    out = t3_attention(
        q, k, v, windows.grid, windows.partition, prefix=windows.prefix, backend=windows.backend, memory=memory
    )
    slot.copy_(out.flatten(2))


def working_bytes(q: torch.Tensor, windows: Windows, heads: int) -> int:
    """Bytes that `t3_attention` is given for copies and results: four tensors of so many heads of q's tokens, or more
    where one window and head needs more."""
    batch, tokens, _, head_dim = q.shape
    longest = max(windows.partition.window_lengths(windows.grid))
    beside = tokens - windows.grid.tokens
    least = 4 * tokens * head_dim
    if windows.backend.scores:
        most = tokens if windows.partition.windows == 1 else longest
        least += 2 * max(most * (longest + beside), beside * tokens)
    return batch * q.element_size() * max(4 * heads * tokens * head_dim, least)


def _attend_at_once(p: Projections, windows: Windows, chunks: Sequence[slice]) -> torch.Tensor:
    """All heads, straight from the projections into the copies of all groupings."""
    batch, tokens, width = p.shape
    grid, partition, prefix = windows.grid, windows.partition, windows.prefix
    rows = list(token_rows(tuple(grid), tuple(partition), batch, p.like.device))
    groups: list = [[p.like.new_empty((batch * grid.tokens, width)) for _ in range(3)] for _ in rows]
    beside = tokens - grid.tokens
    outside = [p.like.new_empty((batch, beside, width)) for _ in range(3)] if beside else None
    for some in chunks:
        x = p.tokens(some)
        inside, around = _pieces(some, prefix, grid.tokens)
        here = slice(inside.start - prefix, inside.stop - prefix)
        at = [None if to is None else to[:, here] for to in rows]
        for which, linear in enumerate((p.q, p.k, p.v)):
            outs = [
                group[which] if to is not None else group[which].unflatten(0, (batch, -1))[:, here]
                for group, to in zip(groups, rows, strict=True)
            ]
            if which == 2 and rows == [None] and inside == some and batch == 1:
                linear.some_into(x, None, outs[0])
                continue
            y, how = linear.call(x), (p.norm(which, None), p.eps)
            if here.stop > here.start:
                window_group_into(_rows(y, inside, some), outs, at, *how, *p.turn(which, inside))
            for piece, first in around:
                assert outside is not None
                out = outside[which][:, first : first + piece.stop - piece.start]
                window_group_into(_rows(y, piece, some), [out], [None], *how, *p.turn(which, piece))
    del x, y, outs
    scale = 1 / math.sqrt(width // p.heads)
    return attend_groups(groups, rows, grid, partition, p.heads, windows.backend, scale, outside, prefix)


def _pieces(some: slice, prefix: int, tokens: int) -> tuple[slice, list[tuple[slice, int]]]:
    """Of the tokens `some`: those of a grid of `tokens` after the first `prefix`, perhaps none; and the runs of others,
    each with the place of its first among all others."""
    end = prefix + tokens
    first, last = (min(max(at, prefix), end) for at in (some.start, some.stop))
    before, after = slice(some.start, min(some.stop, prefix)), slice(max(some.start, end), some.stop)
    around = [(before, before.start), (after, after.start - tokens)]
    return slice(first, last), [(piece, at) for piece, at in around if piece.stop > piece.start]


def _rows(y: torch.Tensor, piece: slice, some: slice) -> torch.Tensor:
    """Those of `piece` from the rows of `some`."""
    return y[:, piece.start - some.start : piece.stop - some.start]
