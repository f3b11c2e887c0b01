"""One video's tokens over several ranks: each has a run of them everywhere but in attention, where it has all tokens of
some heads (Ulysses, arXiv 2309.14509). T3's windows are taken between the two exchanges.

Projections, the norms over the full width and the rotation need a rank's own tokens only, so they are done before, and
written as they are sent: what goes to a rank lies together. What stays here is copied while the last of the rest is on
its way.
What arrives needs no more than grouping; the mean of the groupings is taken before the way back.

Nothing is sent while windows are attended: an attention kernel that spreads over the whole card waits for the
processors that sending takes, which cost more than it hid (two H100: 3.30 s a forward, 3.18 in turn).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from ..block import Projections, Windows, attend_heads
from ..chunks import token_chunks
from ..errors import T3Error
from ..fused import attend_groups, refusal
from ..kernels.window_group.op import window_group, window_group_into
from ..windows import token_rows

# Runs of a rank's tokens. While one is sent the next is projected; while one comes back the rest of the block works on
# the one before. All parts have the memory of one: what is sent and what arrives are there at once in any case.
# Two H100, the 1.3B at 4K: five layers take 540.0, 539.0, 536.8 and 543.7 ms in 1, 2, 4 and 8 parts. With more, the
# last one's exchange, which nothing hides, is shorter; and the projections meet more of the others'.
PARTS = 4


@dataclass(frozen=True)
class Spread:
    """The ranks that share a video's tokens, and this one's place among them.

    groups: of heads, at least; memory may ask for more. parts: see `PARTS`; one where heads go in groups.
    The result depends on neither.
    """

    group: Any
    rank: int
    size: int
    groups: int = 1
    parts: int = PARTS

    def shares(self, tokens: int) -> list[int]:
        """Tokens of each rank, as `torch.tensor_split` gives them: those of the first may have one more."""
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def at_once(self, heads: int, most: int | None) -> int:
        """Heads in a group, of the `heads` that this rank attends; `most`: what memory allows. All groups are alike."""
        wanted = max(1, heads // self.groups)
        wanted = wanted if most is None else max(1, min(wanted, most))
        return next(n for n in range(wanted, 0, -1) if heads % n == 0)

    def more_bytes(self, tensor: int, heads: int, most: int | None) -> int:
        """What a block needs beyond `memory.block_bytes` of this rank's tokens and heads: q, k, v of a group of heads
        stand in both groupings. tensor: bytes of the block's input."""
        return 0 if most is None else 2 * tensor * self.at_once(heads, most) // heads


def attend_projections(
    p: Projections, windows: Windows, spread: Spread, most: int | None, chunks: Sequence[slice]
) -> tuple[torch.Tensor, Iterator[slice]]:
    """As `block.attend`, of one rank's tokens: p and chunks are of these.

    most: heads to attend at once at most, of the `heads / size` of this rank; None: all.
    Returns `[B, n, width]`, of its own, and chunks of at most that size, cut where parts end: the tokens of each are
    there when the iterator gives it.
    """
    layer = _Layer(spread, windows, p.heads, p.shape, p.like, most)
    rows_at_once = max(rows.stop - rows.start for rows in chunks) * p.shape[0]
    cut = [_cut(run, p.shape[0], rows_at_once) for run in layer.parts]
    for part, some in enumerate(cut):
        for rows in some:
            _project(p, layer, rows)
        if layer.groups == 1:
            layer.send(0, part)
    return layer.attend([rows for some in cut for rows in some])


def attend_over_ranks(
    qkv: Sequence[torch.Tensor], windows: Windows, heads: int, spread: Spread, most: int | None = None
) -> torch.Tensor:
    """T3 self-attention of all ranks' tokens, before its output projection, for this rank's: `[B, n, width]`.

    qkv: `[B, n, width]` each, normed and turned: the tokens of this rank. windows: of the whole video. most: as for
    `attend_projections`. No gradients. Raises `T3Error` where heads cannot be shared alike.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
        raise T3Error("attention over several ranks has no gradients: use torch.no_grad() or inference_mode().")
    layer = _Layer(spread, windows, heads, qkv[0].shape, qkv[0], most)
    for part, run in enumerate(layer.parts):
        for which, x in enumerate(qkv):
            layer.pack(which, x[:, run], run)
        if layer.groups == 1:
            layer.send(0, part)
    out, chunks = layer.attend(layer.parts)
    for _ in chunks:
        pass
    return out


def _project(p: Projections, layer: _Layer, rows: slice) -> None:
    """q, k and v of some tokens, normed and turned, to where they are sent from."""
    x = p.tokens(rows)
    for which, linear in enumerate((p.q, p.k, p.v)):
        y, norm, turns = linear.call(x), p.norm(which, None), p.turn(which, rows)
        if norm is None and turns[0] is None:
            layer.pack(which, y, rows)
        else:
            window_group_into(y, [layer.places(which)[:, rows]], [None], norm, p.eps, *turns)


class _Layer:
    """Self-attention of one layer. Its user packs q, k, v of all `parts`, sends each part where there is one group of
    heads, and attends.

    packed: of q, k and v, `[groups, ranks, B, n, piece]`: what goes to a rank, of a group of its heads, lies together.
    """

    def __init__(
        self, spread: Spread, windows: Windows, heads: int, shape: Sequence[int], like: torch.Tensor, most: int | None
    ) -> None:
        """shape: `[B, n, width]` of q, k, v of this rank's tokens; like: of their dtype, on their device."""
        self.batch, tokens, self.width = shape
        self.spread, self.windows, self.like = spread, windows, like
        self.shares = _checked(spread, heads, tokens, windows)
        own = heads // spread.size
        self.heads = spread.at_once(own, most)
        self.groups = own // self.heads
        self.piece = self.width // spread.size // self.groups
        self.parts = self._parts_of(tokens)
        self.packed = [like.new_empty(self.groups, spread.size, self.batch, tokens, self.piece) for _ in range(3)]
        self._received: list[torch.Tensor] = []
        self._works: list[Any] = []
        self._stays: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _parts_of(self, tokens: int) -> list[slice]:
        return _runs(tokens, self.spread.parts if self.groups == 1 else 1)

    def _everyones(self, part: int) -> list[slice]:
        """Of each rank, which of all tokens are in this part of its own."""
        begins = [sum(self.shares[:rank]) for rank in range(self.spread.size)]
        runs = [self._parts_of(share)[part] for share in self.shares]
        return [slice(at + run.start, at + run.stop) for at, run in zip(begins, runs, strict=True)]

    def _channels(self, rank: int, number: int) -> slice:
        """Of the width, those of a rank's group of heads."""
        start = (rank * self.groups + number) * self.piece
        return slice(start, start + self.piece)

    def places(self, which: int) -> torch.Tensor:
        """Where channels of q (0), k (1) or v (2) belong: `[B, n, ranks, groups, piece]`."""
        return self.packed[which].permute(2, 3, 1, 0, 4)

    def pack(self, which: int, x: torch.Tensor, rows: slice) -> None:
        """Put some tokens of q, k or v, `[B, rows, width]`, where they are sent from."""
        for rank in range(self.spread.size):
            for number in range(self.groups):
                to = self.packed[which][number, rank][:, rows]
                window_group_into(x[..., self._channels(rank, number)], [to], [None])

    def send(self, number: int, part: int) -> None:
        """Begin to give a part of a group of heads to those who attend it, and to take all others' part."""
        if not self._received:
            self._received = [self.like.new_empty(self.batch, sum(self.shares), self.piece) for _ in range(3)]
        samples, run, everyones = range(self.batch), self.parts[part], self._everyones(part)
        give = [[x[number, to, b, run] for x in self.packed for b in samples] for to in range(self.spread.size)]
        take = [[x[b, rows] for x in self._received for b in samples] for rows in everyones]
        self._works += _swap(give, take, self.spread)
        self._stays += zip(take[self.spread.rank], give[self.spread.rank], strict=True)

    def attend(self, chunks: Sequence[slice]) -> tuple[torch.Tensor, Iterator[slice]]:
        """See `attend_projections`."""
        if self.groups == 1:
            return self._back_by_parts(self._attend(0), chunks)
        for number in range(self.groups):
            result = self._attend(number)
            # In the place of the queries that were sent.
            room = self.packed[0][number]
            works = self._give_back(result, room, 0)
            room[self.spread.rank] = result[:, self._everyones(0)[self.spread.rank]]
            _wait(works)
            del result
        rooms, self.packed = self.packed[0], []
        out = self._new_out()
        for number, room in enumerate(rooms):
            for rank, x in enumerate(room):
                window_group_into(x, [out[:, :, self._channels(rank, number)]], [None])
        return out, iter(chunks)

    def _new_out(self) -> torch.Tensor:
        return self.like.new_empty(self.batch, self.shares[self.spread.rank], self.width)

    def _attend(self, number: int) -> torch.Tensor:
        """`[B, N, piece]`, all tokens of a group of heads."""
        if self.groups > 1:
            self.send(number, 0)
        received = self._receive()
        if refusal(*received) is None:
            return _attend_at_once(received, self.windows, self.heads)
        attend_heads(received, self.windows, self.heads, received[0])
        return received[0]

    def _receive(self) -> list[torch.Tensor]:
        """q, k, v of all tokens, `[B, N, piece]`, once they are there."""
        # While the last part is on its way; before, it would keep the next from being projected.
        for here, mine in self._stays:
            here.copy_(mine)
        self._stays = []
        _wait(self._works)
        if self.groups == 1:
            self.packed = []
        received, self._received = self._received, []
        return received

    def _give_back(self, result: torch.Tensor, room: torch.Tensor, part: int) -> list[Any]:
        """Begin to return a part of a group of heads, and to take this rank's tokens of all other ranks' heads into
        `room`, `[ranks, B, n, piece]`."""
        samples, run = range(self.batch), self.parts[part]
        give = [[result[b, rows] for b in samples] for rows in self._everyones(part)]
        return _swap(give, [[x[b, run] for b in samples] for x in room], self.spread)

    def _back_by_parts(self, result: torch.Tensor, chunks: Sequence[slice]) -> tuple[torch.Tensor, Iterator[slice]]:
        me, ranks = self.spread.rank, range(self.spread.size)
        room = result.new_empty(self.spread.size, self.batch, self.shares[me], self.piece)
        works = [self._give_back(result, room, part) for part in range(len(self.parts))]
        out = self._new_out()
        begin = sum(self.shares[:me])
        window_group_into(result[:, begin : begin + self.shares[me]], [out[..., self._channels(me, 0)]], [None])

        def put(part: int) -> None:
            _wait(works[part])
            rows = self.parts[part]
            for rank in ranks:
                if rank != me and rows.start < rows.stop:
                    window_group_into(room[rank][:, rows], [out[:, rows, self._channels(rank, 0)]], [None])

        def arriving(result: torch.Tensor) -> Iterator[slice]:
            # What is being sent is kept until it is there.
            parts = iter(range(len(self.parts)))
            there = 0
            for rows in chunks:
                while there < rows.stop:
                    part = next(parts)
                    put(part)
                    there = self.parts[part].stop
                yield rows

        return out, arriving(result)


def _attend_at_once(received: list[torch.Tensor], windows: Windows, heads: int) -> torch.Tensor:
    """T3 attention of q, k, v, `[B, N, heads*head_dim]` each, by our kernels: both groupings are copied in one pass.
    The list is emptied, to let go of each once it is grouped."""
    batch, _, width = received[0].shape
    rows = list(token_rows(tuple(windows.grid), tuple(windows.partition), batch, received[0].device))
    moved = [at for at in rows if at is not None]
    groups: list[list[torch.Tensor]] = [[] for _ in rows]
    while received:
        x = received.pop(0)
        copies = iter(window_group(x, moved) if moved else [])
        for group, at in zip(groups, rows, strict=True):
            group.append(x.flatten(0, 1) if at is None else next(copies))
        del x
    scale = heads**0.5 / math.sqrt(width)
    # Typed as the caller of `attend_groups` wants it; emptied by it.
    return attend_groups([*groups], rows, windows.grid, windows.partition, heads, windows.backend, scale)


def _checked(spread: Spread, heads: int, tokens: int, windows: Windows) -> list[int]:
    """Tokens of each rank. Raises `T3Error` where heads or tokens are not what ranks can share."""
    if heads % spread.size:
        raise T3Error(f"{heads} heads cannot be shared alike by {spread.size} ranks.")
    shares = spread.shares(windows.grid.tokens)
    if tokens != shares[spread.rank]:
        raise T3Error(
            f"rank {spread.rank} of {spread.size} has {tokens} tokens of a grid of {windows.grid.tokens}; "
            f"expected {shares[spread.rank]}."
        )
    return shares


def _runs(tokens: int, count: int) -> list[slice]:
    """`tokens` cut into `count` runs, as even as can be; some are empty where there are fewer tokens."""
    ends = [tokens * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _cut(run: slice, batch: int, rows: int) -> list[slice]:
    """A run of tokens in chunks of at most so many rows (samples x tokens), as even as can be."""
    if run.start == run.stop:
        return []
    found = token_chunks(run.stop - run.start, batch, rows)
    return [slice(run.start + some.start, run.start + some.stop) for some in found]


def _swap(give: list[list[torch.Tensor]], take: list[list[torch.Tensor]], spread: Spread) -> list[Any]:
    """Begin to send `give[r]` to each other rank r and to fill `take[r]` by what it sends: contiguous tensors, of which
    the empty ones are left out. Returns what to wait for; until then nothing of it may be let go of.

    As one operation, without this rank's own, which an all-to-all would send as well.
    """
    operations = []
    for step in range(1, spread.size):
        to, source = (spread.rank + step) % spread.size, (spread.rank - step) % spread.size
        for do, peer, tensors in ((dist.isend, to, give[to]), (dist.irecv, source, take[source])):
            for tag, x in enumerate(tensors):
                if x.numel():
                    operations.append(dist.P2POp(do, x, group=spread.group, tag=tag, group_peer=peer))
    return list(dist.batch_isend_irecv(operations)) if operations else []


def _wait(works: list[Any]) -> None:
    """Until all is there: a card waits, its process does not. The list is emptied."""
    while works:
        works.pop().wait()
