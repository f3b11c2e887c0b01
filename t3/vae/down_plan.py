"""Before an encode: the tile to begin with, and where the middle stage's input waits, so that the memory suffices."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from .choice import Axis, Choice, Part, axes, part_of, share_out
from .down_memory import down_middle_bytes, down_tile_bytes, features_bytes
from .down_structure import DownStructure
from .down_tiles import down_spans, down_windows
from .plan import Needs, Plan, in_latents, plan_within
from .tiles import Window, cut


def make_down_plan(
    structure: DownStructure,
    size: tuple[int, int, int],
    device: torch.device,
    itemsize: int,
    memory: int | None,
    tile: int | tuple[int, int] | None,
    ranks: int = 1,
) -> Plan:
    """The plan for an encode to latents of `size` (T, H, W). Its `keep_on` is where the middle stage's input waits.

    itemsize: bytes of a number; memory, tile: as for `encode_frames`; ranks: how many share the tiles.
    Raises T3Error if there is no plan within `memory`, or for a tile of less than a latent.
    """
    frames, height, width = size
    if tile is None:
        found = down_choices(structure, height, width, itemsize)
        if ranks > 1:
            found = shared_down_choices(structure, height, width, itemsize, ranks)
    else:
        found = (down_weigh(structure, height, width, in_latents(tile, structure.scale), itemsize),)
    kept = features_bytes(structure, frames, height, width, itemsize)
    needs = Needs(
        "encod",
        f"{frames} latent frames of {width * structure.scale} x {height * structure.scale} pixels",
        down_middle_bytes(structure, height, width, itemsize),
        kept,
        # Where it waits in main memory, one frame of it is copied to the device at a time.
        passing=kept // frames,
    )
    return plan_within(memory, found, needs, device, tile)


def down_weigh(structure: DownStructure, height: int, width: int, tile: tuple[int, int], itemsize: int) -> Choice:
    """What encoding to `height` x `width` latents in tiles of at most `tile` latents takes."""
    rows, cols = _Axis(structure, height, tile[0]), _Axis(structure, width, tile[1])
    untiled = _work(structure, _Axis(structure, height, height), _Axis(structure, width, width))
    return _weigh(structure, rows, cols, untiled, itemsize)


@lru_cache(maxsize=8)
def down_choices(structure: DownStructure, height: int, width: int, itemsize: int) -> tuple[Choice, ...]:
    """Every sensible tile for this picture, the cheapest first, and the smallest first among equals. Remembered."""
    rows, cols = axes(_Axis, structure, height), axes(_Axis, structure, width)
    untiled = _work(structure, rows[0], cols[0])
    found = [_weigh(structure, row, col, untiled, itemsize) for row in rows for col in cols]
    return tuple(sorted(found, key=lambda choice: choice.order))


@lru_cache(maxsize=8)
def shared_down_choices(
    structure: DownStructure, height: int, width: int, itemsize: int, ranks: int
) -> tuple[Choice, ...]:
    """As `down_choices`, for tiles that ranks share: `work` is what the busiest of them has to do."""
    rows, cols = axes(_Axis, structure, height), axes(_Axis, structure, width)
    return share_out(down_choices(structure, height, width, itemsize), rows, cols, partial(_work, structure), ranks)


def down_tile_costs(structure: DownStructure, height: int, width: int, tile: tuple[int, int]) -> list[float]:
    """Multiplications of each tile, in the order of `t3.vae.tiles.cores`."""
    rows, cols = _Axis(structure, height, tile[0]), _Axis(structure, width, tile[1])
    return [_work(structure, row, col) for row in rows.parts for col in cols.parts]


class _Axis(Axis):
    """One axis cut into tiles, as the encoder needs them, with the core that needs most."""

    def __init__(self, structure: DownStructure, size: int, most: int) -> None:
        spans = cut(size, most)
        needs = [down_spans(span, structure.reach, structure.first_radius) for span in spans]
        super().__init__([part_of(levels, span) for span, (_, levels) in zip(spans, needs, strict=True)])
        self.widest = max(zip(spans, needs, strict=True), key=lambda pair: pair[1][0].length)[0]


def _weigh(structure: DownStructure, rows: _Axis, cols: _Axis, untiled: int, itemsize: int) -> Choice:
    def count() -> int:
        windows = down_windows(Window(rows.widest, cols.widest), structure.reach, structure.first_radius)
        return down_tile_bytes(structure, windows, itemsize)

    return Choice((rows.most, cols.most), _work(structure, rows, cols) / untiled, count)


def _work(structure: DownStructure, rows: Part, cols: Part) -> int:
    """Multiplications of all convolutions before the middle stage, for a latent frame that is not the first."""
    frames = structure.step
    areas = [[r * c for r, c in zip(*level, strict=True)] for level in zip(rows.lengths, cols.lengths, strict=True)]
    total = frames * 27 * structure.picture_channels * structure.levels[0].blocks[0].into * areas[0][0]
    for i, level in enumerate(structure.levels):
        for block, area in zip(level.blocks, areas[i][1:], strict=True):
            total += frames * 27 * (block.into + block.out) * block.out * area
        if level.downsample is not None:
            down = level.downsample
            total += frames * down.kernel**2 * down.channels**2 * areas[i + 1][0]
            if down.temporal:
                frames //= 2
                total += frames * down.depth * down.channels**2 * areas[i + 1][0]
    return total
