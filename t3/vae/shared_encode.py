"""The exact tiled encode over ranks: tiles down to the middle stage, then the middle stage by latent frames."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from ..errors import T3Error
from .attempt import Meter, Say
from .balance import assign, loads
from .down_plan import down_tile_costs, make_down_plan
from .encode import ClipEncode, Progress
from .encoder import WanEncoder
from .frames import check_frames
from .memory import free_for_each
from .plan import Plan
from .ranks import Ranks
from .shared_middle import SharedMiddle
from .tiles import Window, cores


@torch.no_grad()
def encode_shared(
    encoder: WanEncoder,
    frames: torch.Tensor | None,
    ranks: Ranks,
    *,
    memory: int | None = None,
    tile: int | tuple[int, int] | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    report: dict | None = None,
) -> torch.Tensor:
    """`encode_frames` by all `ranks` together, each of which calls this with the same weights and dtype.

    frames: the same on all ranks; or None on others than rank 0, to which it sends them then.

    Bit-equal to `encode_frames` with this `tile`. Without one, the tiles are those with which the busiest rank has
    least to do. memory: of each rank; the least counts. progress: of this rank's own work, on each rank that gives one.
    report: as for `decode_shared`.

    Returns:
        The latents of `encode_frames`, on every rank.

    Raises:
        T3Error: as `encode_frames`; before any work on every rank. RankLost: another process is gone.
    """
    structure = encoder.structure
    say = say or logging.getLogger(__name__).warning
    frames = _on_every_rank(frames, encoder, ranks, say)
    batch, count, height, width, _ = frames.shape
    size = structure.latent_frames(count), height // structure.scale, width // structure.scale
    least = min(ranks.words(free_for_each(encoder.device, ranks.size) if memory is None else memory))
    # All find the same but for the device, which is each rank's own.
    plans = ranks.agree(
        partial(make_down_plan, structure, size, encoder.device, encoder.dtype.itemsize, least, tile, ranks.size)
    )
    first = plans[ranks.rank]
    costs = down_tile_costs(structure, *size[1:], first.tile)
    pieces = cores(*size[1:], first.tile)
    owners = assign(costs, ranks.size)
    if report is not None:
        busy = loads(costs, ranks.size)
        report |= {
            "tile": [side * structure.scale for side in first.tile],
            "tiles": len(pieces),
            "own_tiles": owners.count(ranks.rank),
            "balance": sum(busy) / ranks.size / max(busy),
        }
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    latents = torch.empty(batch, structure.latent_channels, *size, dtype=dtype)
    own_work = sum(core.area for core, owner in zip(pieces, owners, strict=True) if owner == ranks.rank) * count
    meter = Meter(progress, batch * own_work)
    for clip, found in zip(frames, latents, strict=True):
        plan = Plan(first.tile, first.keep_on, first.scores)
        _SharedClip(encoder, clip, found, plan, meter, say, ranks).encode_share(pieces, owners, report)
    return latents


def _on_every_rank(frames: torch.Tensor | None, encoder: WanEncoder, ranks: Ranks, say: Say) -> torch.Tensor:
    """The frames, checked, where not all ranks have them: from rank 0, one at a time and by way of the device."""

    def look() -> tuple[torch.Size, torch.dtype] | None:
        if frames is None and ranks.first:
            raise T3Error("rank 0 has no frames to encode: give it `frames`.")
        if frames is None:
            return None
        check_frames(frames, encoder.structure, say)
        return frames.shape, frames.dtype

    seen = ranks.agree(look)
    assert seen[0] is not None
    if None in seen:
        shape, dtype = seen[0]
        frames = torch.empty(shape, dtype=dtype) if frames is None else frames
        ranks.meet()
        for clip in frames:
            for frame in clip:
                sent = ranks.share(frame.to(encoder.device).contiguous(), 0)
                if not ranks.first:
                    frame.copy_(sent)
    assert frames is not None
    return frames


class _SharedClip(ClipEncode):
    """One clip; every rank gets all of its latents."""

    def __init__(
        self,
        encoder: WanEncoder,
        frames: torch.Tensor,
        latents: torch.Tensor,
        plan: Plan,
        meter: Meter,
        say: Say,
        ranks: Ranks,
    ) -> None:
        super().__init__(encoder, frames, latents, plan, meter, say)
        self.ranks = ranks

    def encode_share(self, pieces: Sequence[Window], owners: Sequence[int], report: dict | None) -> None:
        """This rank's tiles, everybody's results of them, this rank's frames of the middle stage."""
        features = self.room()
        self.tiles([core for core, owner in zip(pieces, owners, strict=True) if owner == self.ranks.rank], features)
        self._share_features(features, pieces, owners)
        _, frames, height, width = self.latents.shape
        # Frames count as tiles do: the middle stage has no progress of its own.
        quiet = Meter(None, 0)
        middle = SharedMiddle(self.encoder, frames, (height, width), self.ranks, self.plan, quiet, self.say, "encode")
        if report is not None:
            report["own_frames"] = len(middle.own)
        # The others' frames are not looked at again.
        for frame in set(range(frames)) - set(middle.inputs):
            features[frame] = features[frame].new_empty(0)
        results = middle.run(lambda frame: features[frame].to(self.encoder.device))
        self.ranks.meet()
        for frame, mean in enumerate(results):
            shape = 1, self.latents.shape[0], height, width
            place = torch.empty(shape, dtype=self.encoder.dtype, device=self.encoder.device)
            if mean is not None:
                place.copy_(mean)
            self.latents[:, frame] = self.finite(self.ranks.share(place, middle.owner[frame])[0].to(self.latents))

    def _share_features(self, features: list[torch.Tensor], pieces: Sequence[Window], owners: Sequence[int]) -> None:
        """Every tile's part of every frame, to every rank, one at a time."""
        self.ranks.meet()
        for whole in features:
            for core, owner in zip(pieces, owners, strict=True):
                part = whole[core.here].to(self.encoder.device).contiguous()
                self.ranks.share(part, owner)
                if owner != self.ranks.rank:
                    whole[core.here] = part.to(whole.device)
