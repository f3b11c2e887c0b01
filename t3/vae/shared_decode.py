"""The exact tiled decode over ranks: the middle stage by latent frames, the rest by tiles, the pieces to rank 0."""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from ..errors import T3Error
from .attempt import Meter, Say
from .balance import assign, loads
from .choice import tile_costs
from .decode import ClipDecode, Progress, check_latents
from .decoder import WanDecoder
from .memory import free_for_each
from .output import Outlet, check_out
from .pieces import Inbox, Sender, SendingOutlet, tell_failure
from .plan import Plan, make_plan
from .ranks import Ranks
from .shared_middle import SharedMiddle
from .tiles import Window, cores


@torch.no_grad()
def decode_shared(
    decoder: WanDecoder,
    latents: torch.Tensor | None,
    ranks: Ranks,
    *,
    memory: int | None = None,
    tile: int | tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    report: dict | None = None,
) -> torch.Tensor | None:
    """`decode_frames` by all `ranks` together, each of which calls this with a decoder of the same weights and dtype.

    Every number is computed as one process computes it with the same tiles, so the result is bit-equal to that of
    `decode_frames` with this `tile`. Without one, the tiles are those with which the busiest rank has least to do.

    Args:
        latents, out, progress: as for `decode_frames`, on rank 0. Other ranks may give None: what they give is not
            looked at. Rank 0 holds `out` and, beside it, one piece of a frame for each other rank.
        memory: as for `decode_frames`, of each rank; the least of them counts.
        tile: the same on every rank.
        say: told on rank 0 what any rank resorts to.
        report: takes on each rank the tile, its share of frames and tiles, `balance` (the mean of all ranks' work in
            tiles over the busiest's), and seconds of the choice of tiles, which every rank makes, of the middle stage,
            of its own tiles, and of rank 0's wait for the others after that; of the last clip.

    Returns:
        `out` on rank 0, None on the others.

    Raises:
        T3Error: on every rank, as `decode_frames`. RankLost: another process is gone.
    """
    say = say or logging.getLogger(__name__).warning
    began = time.perf_counter()
    asked = ranks.agree(partial(_asked, decoder, latents, out, ranks))[0]
    assert asked is not None
    batch, size, structure = asked.batch, asked.size, decoder.structure
    least = min(ranks.words(free_for_each(decoder.device, ranks.size) if memory is None else memory))
    # All find the same but for the device, which is each rank's own.
    plans = ranks.agree(
        partial(make_plan, structure, size, decoder.device, decoder.dtype.itemsize, least, tile, ranks.size)
    )
    first = plans[ranks.rank]
    costs = tile_costs(structure, *size[1:], first.tile)
    pieces = cores(*size[1:], first.tile)
    mine = [core for core, rank in zip(pieces, assign(costs, ranks.size), strict=True) if rank == ranks.rank]
    if report is not None:
        busy = loads(costs, ranks.size)
        scale = structure.scale
        report |= {
            "tile": [side * scale for side in first.tile],
            "tiles": len(pieces),
            "own_tiles": len(mine),
            "balance": sum(busy) / ranks.size / max(busy),
            "plan_seconds": time.perf_counter() - began,
        }
    if ranks.first and out is None:
        out = torch.empty(_frames_shape(decoder, batch, size), dtype=asked.dtype)
    total = batch * size[1] * size[2] * (size[0] + structure.frames(size[0]))
    for number in range(batch):
        clip = _share_latents(latents, number, size, decoder, ranks)
        plan = Plan(first.tile, first.keep_on, first.scores)
        target = out[number] if ranks.first and out is not None else None
        work = number * total // batch, total, progress
        _SharedClip(decoder, clip, target, asked.dtype, plan, ranks, work, say).decode_share(mine, report)
    return out if ranks.first else None


class _Asked(NamedTuple):
    """What all ranks must know: clips, latents of each `(T, H, W)`, the dtype of frames."""

    batch: int
    size: tuple[int, int, int]
    dtype: torch.dtype


def _asked(decoder: WanDecoder, latents: torch.Tensor | None, out: torch.Tensor | None, ranks: Ranks) -> _Asked | None:
    """On rank 0, checked; None on the others."""
    if not ranks.first:
        return None
    if latents is None:
        raise T3Error("rank 0 has no latents to decode: give it `latents`.")
    check_latents(decoder, latents)
    batch, _, frames, height, width = latents.shape
    dtype = torch.float64 if decoder.dtype == torch.float64 else torch.float32
    if out is not None:
        check_out(out, _frames_shape(decoder, batch, (frames, height, width)))
        dtype = out.dtype
    return _Asked(batch, (frames, height, width), dtype)


def _frames_shape(decoder: WanDecoder, batch: int, size: tuple[int, int, int]) -> tuple[int, ...]:
    frames, height, width = size
    scale = decoder.structure.scale
    return batch, decoder.structure.frames(frames), height * scale, width * scale, 3


def _share_latents(
    latents: torch.Tensor | None, number: int, size: tuple[int, int, int], decoder: WanDecoder, ranks: Ranks
) -> torch.Tensor:
    """Rank 0's clip `[1, C, T, H, W]`, in the decoder's dtype on its device, on every rank."""
    if ranks.first:
        assert latents is not None
        clip = latents[number][None].to(decoder.device, decoder.dtype).contiguous()
    else:
        shape = 1, decoder.structure.latent_channels, *size
        clip = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
    ranks.meet()
    return ranks.share(clip, 0)


class _SharedClip(ClipDecode):
    """One clip; `out` is None on other ranks than 0."""

    def __init__(
        self,
        decoder: WanDecoder,
        latents: torch.Tensor,
        out: torch.Tensor | None,
        dtype: torch.dtype,
        plan: Plan,
        ranks: Ranks,
        work: tuple[int, int, Progress | None],
        say: Say,
    ) -> None:
        """work: what was done before this clip, the work in all, and who is told."""
        self.ranks, self.dtype = ranks, dtype
        done, total, progress = work
        if out is not None:
            self.inbox = Inbox(ranks, out, say)
            meter = Meter(partial(self._told, done, progress), total)
        else:
            meter, heard = Meter(None, total), deque[str]()
            self.sender, say = Sender(ranks, meter, heard), heard.append
        super().__init__(decoder, latents, out if out is not None else torch.empty(0), plan, meter, say)

    def _told(self, before: int, progress: Progress | None, done: int, total: int) -> None:
        self.inbox.look()
        if progress is not None:
            progress(before + done + self.inbox.work, total)

    def decode_share(self, mine: list[Window], report: dict | None) -> None:
        """This rank's part of the clip: frames of the middle stage, then tiles."""
        _, _, frames, height, width = self.latents.shape
        middle = SharedMiddle(
            self.decoder, frames, (height, width), self.ranks, self.plan, self.meter, self.say, "decode"
        )
        times = [time.perf_counter()]
        hidden = self._share_hidden(middle, middle.run(lambda frame: self.latents[:, :, frame]))
        times.append(time.perf_counter())
        if self.ranks.first:
            self._collect(mine, hidden, times)
        else:
            self._deliver(mine, hidden)
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        if report is not None:
            report["own_frames"] = len(middle.own)
            names = ("middle_seconds", "tiles_seconds", "wait_seconds")
            report |= {name: end - begin for name, (begin, end) in zip(names, pairwise(times), strict=True)}

    def _deliver(self, mine: list[Window], hidden: list[torch.Tensor]) -> None:
        """On other ranks than 0: tiles, to rank 0."""
        try:
            self.tiles(mine, hidden)
            self.sender.done()
        except T3Error as error:
            tell_failure(self.sender, error)
            raise

    def _collect(self, mine: list[Window], hidden: list[torch.Tensor], times: list[float]) -> None:
        """On rank 0: its own tiles, and beside them the others' pieces."""
        self.inbox.open()
        try:
            self.tiles(mine, hidden)
            times.append(time.perf_counter())
            self.inbox.wait(self.meter)
        except T3Error:
            self.inbox.close()
            raise

    def _share_hidden(self, middle: SharedMiddle, results: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """Every frame on every rank, where the plan keeps them."""
        self.ranks.meet()
        like = torch.empty(0, dtype=self.decoder.dtype, device=self.decoder.device)
        hidden = []
        for frame, result in enumerate(results):
            results[frame] = None
            x = middle.room(like, self.decoder.structure.width) if result is None else result.to(like.device)
            hidden.append(self.ranks.share(x, middle.owner[frame]).to(self.plan.keep_on))
        return hidden

    def outlet(self, pixels: Window) -> Outlet:
        if self.ranks.first:
            return super().outlet(pixels)
        return SendingOutlet(self.sender, pixels, self.frames, self.dtype, self.decoder.device)
