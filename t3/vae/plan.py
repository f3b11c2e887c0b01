"""Before a decode: the tile to begin with, and where the middle stage's results wait, so that the memory suffices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import T3Error
from .choice import Choice, best, choices, weigh
from .memory import free_bytes, kept_bytes, middle_bytes, with_room
from .structure import Structure

# More work than this in smaller tiles, and the middle stage's results go to main memory instead.
_WORTH_KEEPING = 1.15


@dataclass
class Plan:
    """tile: most rows and columns of a tile's core, in latents. keep_on: where the middle stage's results wait.
    scores: bytes that scores of the middle attention may take."""

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
) -> Plan:
    """The plan for latents of `size` (T, H, W). itemsize: bytes of a number; memory, tile: as for `decode_frames`.

    Raises T3Error if there is no plan within `memory`, or for a tile of less than a latent.
    """
    frames, height, width = size
    stated = f"memory is {memory:,} bytes" if memory is not None else f"about {free_bytes(device):,} bytes are free"
    memory = free_bytes(device) if memory is None else memory
    counted = memory * 100 // with_room(100, device)
    if tile is None:
        found = choices(structure, height, width, itemsize)
    else:
        found = [weigh(structure, height, width, _in_latents(tile, structure.scale), itemsize)]
    middle = middle_bytes(structure, height, width, itemsize)
    kept = kept_bytes(structure, frames, height, width, itemsize)

    main = torch.device("cpu")
    plans: list[tuple[Choice, Plan]] = []
    for place in dict.fromkeys((device, main)):
        left = counted - (kept if place == device else 0)
        chosen = best(found, left)
        if chosen is not None and middle < left:
            plans.append((chosen, Plan(chosen.tile, place, left - middle)))
    if not plans:
        least = max(middle + 1, min(choice.bytes for choice in found)) + (kept if device == main else 0)
        least = with_room(least, device) + (device != main)
        what = "" if tile is None else f" with tiles of {tile} pixels"
        raise T3Error(
            f"{stated}, but decoding {frames} latent frames of {width * structure.scale} x "
            f"{height * structure.scale} pixels{what} takes {least:,} or more. Give at least that"
            + (", free memory" if memory is None else "")
            + (", decode on the CPU" if device != main else "")
            + (" or use smaller tiles." if tile is not None else ", or decode a smaller picture.")
        )
    # Nearest first: the device itself, unless that makes much more work.
    return plans[0][1] if plans[0][0].work <= _WORTH_KEEPING * plans[-1][0].work else plans[-1][1]


def _in_latents(tile: int | tuple[int, int], scale: int) -> tuple[int, int]:
    rows, cols = (tile, tile) if isinstance(tile, int) else tile
    if min(rows, cols) < scale:
        raise T3Error(f"tile is {tile} pixels; one latent is {scale} x {scale} pixels, so give {scale} or more.")
    return rows // scale, cols // scale
