"""Which tile to decode with: the one that costs the least work among those that fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .memory import tile_bytes
from .structure import Structure
from .tiles import AxisSpans, Span, Window, axis_spans, cut, tile_windows

# Tiles that cost this much more than the cheapest are as good: the smallest of them is taken.
_AS_GOOD = 1.01


@dataclass(frozen=True)
class Choice:
    """Tile cores of at most `tile` (rows, columns; in latents), `bytes` each at most, `work` times the untiled work."""

    tile: tuple[int, int]
    bytes: int
    work: float


def weigh(structure: Structure, height: int, width: int, tile: tuple[int, int], itemsize: int) -> Choice:
    """What decoding `height` x `width` latents in tiles of at most `tile` takes."""
    rows, cols = _Axis(structure, height, tile[0]), _Axis(structure, width, tile[1])
    return _weigh(structure, rows, cols, _Axis(structure, height, height), _Axis(structure, width, width), itemsize)


@lru_cache(maxsize=8)
def choices(structure: Structure, height: int, width: int, itemsize: int) -> tuple[Choice, ...]:
    """Every sensible tile for this picture, the cheapest first, and the smallest first among equals.

    Remembered: at 4K there are more than a thousand, which takes as long as some tiles do.
    """
    rows, cols = list(_axes(structure, height)), list(_axes(structure, width))
    found = [_weigh(structure, row, col, rows[0], cols[0], itemsize) for row in rows for col in cols]
    return tuple(sorted(found, key=lambda choice: (choice.work, choice.bytes)))


def best(found: Sequence[Choice], memory: int) -> Choice | None:
    """The cheapest that fits; of those as good, the smallest."""
    fitting = [choice for choice in found if choice.bytes <= memory]
    as_good = [choice for choice in fitting if choice.work <= _AS_GOOD * fitting[0].work]
    return min(as_good, key=lambda choice: choice.bytes, default=None)


class _Axis:
    """One axis cut into tiles: what all tiles need at each level together, and the core that needs most."""

    def __init__(self, structure: Structure, size: int, most: int) -> None:
        spans = cut(size, most)
        needs = [_needs(structure, span) for span in spans]
        self.most = max(span.length for span in spans)
        self.lengths = [
            [sum(need[i][j].length for need in needs) for j in range(len(level))] for i, level in enumerate(needs[0])
        ]
        self.cores = sum(span.length for span in spans)
        self.widest = max(zip(spans, needs, strict=True), key=lambda pair: pair[1][0][0].length)[0]


def _needs(structure: Structure, span: Span) -> AxisSpans:
    return axis_spans(span.scaled(structure.upscale), structure.reach, structure.head_radius)


def _axes(structure: Structure, size: int) -> Iterator[_Axis]:
    """Every way to cut an axis that makes a difference, from one tile to tiles of one latent."""
    for most in sorted({-(-size // count) for count in range(1, size + 1)}, reverse=True):
        yield _Axis(structure, size, most)


def _weigh(structure: Structure, rows: _Axis, cols: _Axis, all_rows: _Axis, all_cols: _Axis, itemsize: int) -> Choice:
    core = Window(rows.widest, cols.widest)
    windows = tile_windows(core.scaled(structure.upscale), structure.reach, structure.head_radius)
    return Choice(
        (rows.most, cols.most),
        tile_bytes(structure, windows, core, itemsize),
        _work(structure, rows, cols) / _work(structure, all_rows, all_cols),
    )


def _work(structure: Structure, rows: _Axis, cols: _Axis) -> int:
    """Multiplications of the residual blocks, the upsampling and the head, for a latent frame that is not the first."""
    total, frames = 0, 1
    for i, level in enumerate(structure.levels):
        areas = [r * c for r, c in zip(rows.lengths[i], cols.lengths[i], strict=True)]
        for block, area in zip(level.blocks, areas[1:], strict=True):
            total += frames * 27 * (block.into + block.out) * block.out * area
        if level.upsample is not None:
            up = level.upsample
            frames *= 2 if up.temporal else 1
            total += frames * 9 * up.into * up.out * rows.lengths[i + 1][0] * cols.lengths[i + 1][0]
    head = structure.levels[-1].blocks[-1].out * 3 * structure.patch**2
    return total + frames * 27 * head * rows.cores * cols.cores * structure.upscale**2
