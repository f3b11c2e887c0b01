"""Which tile to decode with: the one that costs the least work among those that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, TypeVar

from .balance import longest
from .memory import tile_bytes
from .structure import Structure
from .tiles import AxisSpans, Span, Window, axis_spans, cut, tile_windows

# Tiles that cost this much more than the cheapest are as good: the smallest of them is taken.
_AS_GOOD = 1.01
# How much more than the least of the busiest rank's work so far a perfect sharing may take to be looked at closely.
_WORTH_A_LOOK = 1.1


@dataclass(frozen=True)
class Choice:
    """Tile cores of at most `tile` (rows, columns; in latents), `bytes` each at most, `work` times the untiled work."""

    tile: tuple[int, int]
    work: float
    count: Callable[[], int] = field(repr=False, compare=False)

    @cached_property
    def bytes(self) -> int:
        # Not counted before it is asked for: of a thousand tiles a few are looked at so closely.
        return self.count()

    @property
    def order(self) -> tuple[float, int]:
        """The cheapest first, and the smallest first among equals."""
        return self.work, self.tile[0] * self.tile[1]


def weigh(structure: Structure, height: int, width: int, tile: tuple[int, int], itemsize: int) -> Choice:
    """What decoding `height` x `width` latents in tiles of at most `tile` takes."""
    rows, cols = _Axis(structure, height, tile[0]), _Axis(structure, width, tile[1])
    untiled = _work(structure, _Axis(structure, height, height), _Axis(structure, width, width))
    return _weigh(structure, rows, cols, untiled, itemsize)


@lru_cache(maxsize=8)
def choices(structure: Structure, height: int, width: int, itemsize: int) -> tuple[Choice, ...]:
    """Every sensible tile for this picture, the cheapest first, and the smallest first among equals.

    Remembered: at 4K there are more than a thousand, which takes as long as some tiles do.
    """
    rows, cols = axes(_Axis, structure, height), axes(_Axis, structure, width)
    untiled = _work(structure, rows[0], cols[0])
    found = [_weigh(structure, row, col, untiled, itemsize) for row in rows for col in cols]
    return tuple(sorted(found, key=lambda choice: choice.order))


def best(found: Sequence[Choice], memory: int) -> Choice | None:
    """The cheapest that fits; of those as good, the smallest."""
    cheapest = next((choice for choice in found if choice.bytes <= memory), None)
    if cheapest is None:
        return None
    as_good = [choice for choice in found if choice.work <= _AS_GOOD * cheapest.work]
    return min((choice for choice in as_good if choice.bytes <= memory), key=lambda choice: choice.bytes)


@lru_cache(maxsize=8)
def shared_choices(structure: Structure, height: int, width: int, itemsize: int, ranks: int) -> tuple[Choice, ...]:
    """As `choices`, for tiles that ranks share: `work` is what the busiest of them has to do, the cheapest first."""
    rows, cols = axes(_Axis, structure, height), axes(_Axis, structure, width)
    return share_out(choices(structure, height, width, itemsize), rows, cols, partial(_work, structure), ranks)


def share_out(
    found: Sequence[Choice],
    rows: Iterable[Axis],
    cols: Iterable[Axis],
    work: Callable[[Part, Part], int],
    ranks: int,
) -> tuple[Choice, ...]:
    """The choices `found`, cheapest first, with the busiest rank's share for their work, and in the order of that.

    rows, cols: every way to cut the axes. work: multiplications of a tile.
    """
    ways = [{axis.most: kinds(axis.parts) for axis in axes} for axes in (rows, cols)]
    whole = [way[max(way)][0][0] for way in ways]
    untiled, least = work(*whole), float("inf")
    shared = []
    for choice in found:
        high, wide = (way[most] for way, most in zip(ways, choice.tile, strict=True))
        if choice.work / ranks < _WORTH_A_LOOK * least:
            busiest = longest([(work(r, c), n * m) for r, n in high for c, m in wide], ranks) / untiled
            least = min(least, busiest)
        else:
            # Only a bound of it, for where nothing better fits.
            busiest = choice.work / ranks + max(work(r, c) for r, _ in high[:2] for c, _ in wide[:2]) / untiled
        shared.append(replace(choice, work=busiest))
    return tuple(sorted(shared, key=lambda choice: choice.order))


def tile_costs(structure: Structure, height: int, width: int, tile: tuple[int, int]) -> list[float]:
    """Multiplications of each tile, in the order of `t3.vae.tiles.cores`."""
    rows, cols = _Axis(structure, height, tile[0]), _Axis(structure, width, tile[1])
    return [_work(structure, row, col) for row in rows.parts for col in cols.parts]


class Part:
    """Of one axis what a tile, or all of them together, need at each level (`lengths`), and their cores' length."""

    def __init__(self, lengths: list[list[int]], cores: int) -> None:
        self.lengths, self.cores = lengths, cores


def part_of(need: AxisSpans, core: Span) -> Part:
    """Of one tile along one axis."""
    return Part([[at.length for at in level] for level in need], core.length)


def kinds(parts: Sequence[Part]) -> list[tuple[Part, int]]:
    """Tiles of one kind need the same everywhere: one of each, and how many there are."""
    alike: dict[tuple, list[Part]] = {}
    for part in parts:
        alike.setdefault((part.cores, *map(tuple, part.lengths)), []).append(part)
    return [(some[0], len(some)) for some in alike.values()]


class Axis(Part):
    """One axis cut into tiles, `parts`: what all of them need together, and how long the longest core is, `most`."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts, self.most = parts, max(part.cores for part in parts)
        levels = zip(*(part.lengths for part in parts), strict=True)
        lengths = [[sum(at) for at in zip(*level, strict=True)] for level in levels]
        super().__init__(lengths, sum(part.cores for part in parts))


Cut = TypeVar("Cut", bound=Axis)


@lru_cache(maxsize=16)
def axes(kind: Callable[[Any, int, int], Cut], structure: Any, size: int) -> tuple[Cut, ...]:
    """Every way to cut an axis that makes a difference, from one tile to tiles of one latent.

    kind: the axis of a decoder or an encoder, of `structure`, `size` and the longest core.
    """
    ways = sorted({-(-size // count) for count in range(1, size + 1)}, reverse=True)
    return tuple(kind(structure, size, most) for most in ways)


class _Axis(Axis):
    """As the decoder needs it, with the core that needs most."""

    def __init__(self, structure: Structure, size: int, most: int) -> None:
        spans = cut(size, most)
        needs = [_needs(structure, span) for span in spans]
        super().__init__([part_of(need, span) for span, need in zip(spans, needs, strict=True)])
        self.widest = max(zip(spans, needs, strict=True), key=lambda pair: pair[1][0][0].length)[0]


def _needs(structure: Structure, span: Span) -> AxisSpans:
    return axis_spans(span.scaled(structure.upscale), structure.reach, structure.head_radius)


def _weigh(structure: Structure, rows: _Axis, cols: _Axis, untiled: int, itemsize: int) -> Choice:
    def count() -> int:
        core = Window(rows.widest, cols.widest)
        windows = tile_windows(core.scaled(structure.upscale), structure.reach, structure.head_radius)
        return tile_bytes(structure, windows, core, itemsize)

    return Choice((rows.most, cols.most), _work(structure, rows, cols) / untiled, count)


def _work(structure: Structure, rows: Part, cols: Part) -> int:
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
