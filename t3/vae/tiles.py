"""Which pixels a tile of the decoded picture needs at every level of the decoder. Pure Python.

A convolution of radius r makes each pixel out of those up to r away. So, walking back from the pixels a tile shall
deliver (its *core*), the needed window grows by r at every convolution and halves at every upsampling. At the edge of
the picture it stops: there the decoder itself pads with zeros. A tile that computes exactly these windows computes
exactly the numbers of the untiled decoder, and nothing else; what lies around the core is its *halo*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType

# An index of a tensor: everything before the last two axes, and a slice of each of those.
Place = tuple[EllipsisType, slice, slice]


@dataclass(frozen=True)
class Span:
    """Pixels `start` to `stop` (not included) of an axis that has `size` of them."""

    start: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def here(self) -> slice:
        """Where these pixels lie in a tensor of the whole picture."""
        return slice(self.start, self.stop)

    def grown(self, radius: int) -> Span:
        """With `radius` more pixels on each side, as far as the picture goes."""
        return Span(max(self.start - radius, 0), min(self.stop + radius, self.size), self.size)

    def halved(self) -> Span:
        """The pixels at half the size that cover these."""
        return Span(self.start // 2, -(-self.stop // 2), self.size // 2)

    def scaled(self, factor: int) -> Span:
        """The same part of the picture at `factor` times the size."""
        return Span(self.start * factor, self.stop * factor, self.size * factor)

    def inside(self, outer: Span) -> slice:
        """Where these pixels lie in a tensor that holds `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture."""

    rows: Span
    cols: Span

    @classmethod
    def whole(cls, height: int, width: int) -> Window:
        return cls(Span(0, height, height), Span(0, width, width))

    @property
    def area(self) -> int:
        return self.rows.length * self.cols.length

    def grown(self, radius: int) -> Window:
        return Window(self.rows.grown(radius), self.cols.grown(radius))

    def halved(self) -> Window:
        return Window(self.rows.halved(), self.cols.halved())

    def scaled(self, factor: int) -> Window:
        return Window(self.rows.scaled(factor), self.cols.scaled(factor))

    @property
    def here(self) -> Place:
        """Where it lies in a tensor `[..., H, W]` of the whole picture."""
        return ..., self.rows.here, self.cols.here

    def inside(self, outer: Window) -> Place:
        """Where it lies in a tensor `[..., h, w]` that holds `outer`."""
        return ..., self.rows.inside(outer.rows), self.cols.inside(outer.cols)


def padding(span: Span, radius: int) -> int:
    """Zeros that a convolution of this radius puts at both ends of an axis of its input: where the input ends at the
    picture's edge. `conv2d` pads both ends alike; what it gets wrong at an inner end nobody needs, and is left out."""
    return radius if span.start == 0 or span.stop == span.size else 0


def convolved(window: Window, radius: int) -> int:
    """Area of what such a convolution gives of an input that holds `window`."""
    rows, cols = (axis.length - 2 * (radius - padding(axis, radius)) for axis in (window.rows, window.cols))
    return rows * cols


@dataclass(frozen=True)
class Reach:
    """How far the convolutions of one level look. `blocks`: radius of each residual block, both convolutions together.
    `resample`: radius of the convolution after this level's upsampling, None where it does not upsample."""

    blocks: tuple[int, ...]
    resample: int | None


# Per level: what holds of its input, and of the result of each of its blocks.
AxisSpans = tuple[tuple[Span, ...], ...]
TileWindows = tuple[tuple[Window, ...], ...]


def axis_spans(core: Span, reach: Sequence[Reach], head: int) -> AxisSpans:
    """What a tile needs along one axis at each level, for a core given at the last level's size (before unpatchify).

    reach: of the levels, from latents to pixels. head: radius of the last convolution.
    """
    need = core.grown(head)
    levels: list[tuple[Span, ...]] = []
    for level in reversed(reach):
        if level.resample is not None:
            need = need.grown(level.resample).halved()
        spans = [need]
        for radius in reversed(level.blocks):
            need = need.grown(radius)
            spans.insert(0, need)
        levels.insert(0, tuple(spans))
    return tuple(levels)


def tile_windows(core: Window, reach: Sequence[Reach], head: int) -> TileWindows:
    """`axis_spans` of both axes."""
    both = (axis_spans(axis, reach, head) for axis in (core.rows, core.cols))
    return tuple(
        tuple(Window(*pair) for pair in zip(rows, cols, strict=True)) for rows, cols in zip(*both, strict=True)
    )


def halo(reach: Sequence[Reach], head: int) -> int:
    """Latents a tile needs beyond its core on each side, where the picture's edge is far away."""
    far = 1 << 20
    core = Span(far, far + 1, 4 * far).scaled(2 ** (len(reach) - 1))
    first = axis_spans(core, reach, head)[0][0]
    return max(far - first.start, first.stop - far - 1)


def cut(size: int, most: int) -> list[Span]:
    """An axis in as few spans of at most `most` as will do, their lengths equal to within one."""
    count = -(-size // most)
    edges = [i * size // count for i in range(count + 1)]
    return [Span(start, stop, size) for start, stop in pairwise(edges)]


def cores(height: int, width: int, tile: tuple[int, int]) -> list[Window]:
    """The cores, in latents, that cover a picture of `height` x `width` latents in tiles of at most `tile`."""
    return [Window(rows, cols) for rows in cut(height, tile[0]) for cols in cut(width, tile[1])]


def split(window: Window, tile: tuple[int, int]) -> Iterator[Window]:
    """A core in pieces of at most `tile`."""
    for rows in cut(window.rows.length, tile[0]):
        for cols in cut(window.cols.length, tile[1]):
            yield Window(
                Span(window.rows.start + rows.start, window.rows.start + rows.stop, window.rows.size),
                Span(window.cols.start + cols.start, window.cols.start + cols.stop, window.cols.size),
            )
