"""Before a decode or encode: the tile to begin with, and where what is between the middle stage and the tiles waits,
so that the memory suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import T3Error
from .choice import Choice, best, choices, shared_choices, weigh
from .memory import free_bytes, kept_bytes, middle_bytes, with_room
from .structure import Structure

# More work than this in smaller tiles, and what waits goes to main memory instead.
_WORTH_KEEPING = 1.15


@dataclass
class Plan:
    """tile: most rows and columns of a tile's core, in latents. keep_on: where the middle stage's results
    (in an encode, its input) wait. scores: bytes that scores of the middle attention may take."""

    tile: tuple[int, int]
    keep_on: torch.device
    scores: int

    def shrink(self) -> bool:
        """To half the tile, along its longer side; False if it is a single latent."""
        rows, cols = self.tile
        if rows == cols == 1:
            return False
        self.tile = (-(-rows // 2), cols) if rows >= cols else (rows, -(-cols // 2))
        return True


def make_plan(
    structure: Structure,
    size: tuple[int, int, int],
    device: torch.device,
    itemsize: int,
    memory: int | None,
    tile: int | tuple[int, int] | None,
    ranks: int = 1,
) -> Plan:
    """The plan for latents of `size` (T, H, W). itemsize: bytes of a number; memory, tile: as for `decode_frames`;
    ranks: how many share the tiles.

    Raises T3Error if there is no plan within `memory`, or for a tile of less than a latent.
    """
    frames, height, width = size
    if tile is None:
        found = choices(structure, height, width, itemsize)
        if ranks > 1:
            found = shared_choices(structure, height, width, itemsize, ranks)
    else:
        found = (weigh(structure, height, width, in_latents(tile, structure.scale), itemsize),)
    needs = Needs(
        "decod",
        f"{frames} latent frames of {width * structure.scale} x {height * structure.scale} pixels",
        middle_bytes(structure, height, width, itemsize),
        kept_bytes(structure, frames, height, width, itemsize),
    )
    return plan_within(memory, found, needs, device, tile)


class Needs(NamedTuple):
    """What a clip takes whatever its tiles. work: "decod" or "encod". clip: in words. middle: bytes of the middle
    stage. kept: bytes of what waits between it and the tiles. passing: of those, what is on the device for a moment
    where the rest waits in main memory."""

    work: str
    clip: str
    middle: int
    kept: int
    passing: int = 0


def plan_within(
    memory: int | None,
    found: Sequence[Choice],
    needs: Needs,
    device: torch.device,
    tile: int | tuple[int, int] | None,
) -> Plan:
    """The best of the tiles `found` within `memory` bytes of `device`; within what is free there if None.

    tile: what the user asked for, if anything. Raises T3Error where nothing fits.
    """
    stated = f"memory is {memory:,} bytes" if memory is not None else f"about {free_bytes(device):,} bytes are free"
    counted = (free_bytes(device) if memory is None else memory) * 100 // with_room(100, device)
    main = torch.device("cpu")
    plans: list[tuple[Choice, Plan]] = []
    for place in dict.fromkeys((device, main)):
        left = counted - (needs.kept if place == device else needs.passing)
        chosen = best(found, left)
        if chosen is not None and needs.middle < left:
            plans.append((chosen, Plan(chosen.tile, place, left - needs.middle)))
    if not plans:
        beside = needs.kept if device == main else needs.passing
        least = max(needs.middle + 1, min(choice.bytes for choice in found)) + beside
        least = with_room(least, device)
        what = "" if tile is None else f" with tiles of {tile} pixels"
        raise T3Error(
            f"{stated}, but {needs.work}ing {needs.clip}{what} takes {least:,} or more. Give at least that"
            + (", free memory" if memory is None else "")
            + (f", {needs.work}e on the CPU" if device != main else "")
            + (" or use smaller tiles." if tile is not None else f", or {needs.work}e a smaller picture.")
        )
    # Nearest first: the device itself, unless that makes much more work.
    return plans[0][1] if plans[0][0].work <= _WORTH_KEEPING * plans[-1][0].work else plans[-1][1]


def in_latents(tile: int | tuple[int, int], scale: int) -> tuple[int, int]:
    """A tile's rows and columns in whole latents of `scale` pixels. Raises T3Error for less than one."""
    rows, cols = (tile, tile) if isinstance(tile, int) else tile
    if min(rows, cols) < scale:
        raise T3Error(f"tile is {tile} pixels; one latent is {scale} x {scale} pixels, so give {scale} or more.")
    return rows // scale, cols // scale
