"""Which pixels a tile of encoded latents needs at every level of the encoder. Pure Python.

The counterpart of `t3.vae.tiles`, walking the other way: from the latents a tile shall give (its *core*) back to the
picture. The needed window grows by the radius of every convolution and doubles at every halving. A halving is a
convolution of stride 2 that makes pixel y of pixels 2y, 2y + 1, ..., so a window doubled begins at an even pixel, and
a tile computes the very pixels that the whole picture would. The window ends at the picture's edge: there the
encoder itself puts zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tiles import AxisSpans, Span, TileWindows, Window


@dataclass(frozen=True)
class DownReach:
    """How far one level looks. `blocks`: radius of each residual block, both convolutions together. `kernel`: size of
    the convolution of stride 2 after them, None where the level does not halve."""

    blocks: tuple[int, ...]
    kernel: int | None


@dataclass(frozen=True)
class DownWindows:
    """pixels: what of the picture a tile needs (of the encoder's picture, in which Wan2.2's has 2 x 2 pixels as one).
    levels: for each, what holds of its input and of the result of each of its blocks."""

    pixels: Window
    levels: TileWindows


def doubled(span: Span, kernel: int) -> Span:
    """The pixels at twice the size that a convolution of stride 2 makes these of, as far as the picture goes."""
    size = 2 * span.size
    return Span(2 * span.start, min(2 * (span.stop - 1) + kernel, size), size)


def beyond(span: Span, kernel: int) -> int:
    """Pixels of zeros that the same convolution looks at past the picture's end."""
    return 2 * (span.length - 1) + kernel - doubled(span, kernel).length


def down_spans(core: Span, reach: Sequence[DownReach], first: int) -> tuple[Span, AxisSpans]:
    """What a tile needs along one axis: of the picture, and at each level. core: in latents.

    reach: of the levels, from the picture to latents. first: radius of the convolution before them.
    """
    need = core
    levels: list[tuple[Span, ...]] = []
    for level in reversed(reach):
        if level.kernel is not None:
            need = doubled(need, level.kernel)
        spans = [need]
        for radius in reversed(level.blocks):
            need = need.grown(radius)
            spans.insert(0, need)
        levels.insert(0, tuple(spans))
    return need.grown(first), tuple(levels)


def down_windows(core: Window, reach: Sequence[DownReach], first: int) -> DownWindows:
    """`down_spans` of both axes."""
    (rows, row_levels), (cols, col_levels) = (down_spans(axis, reach, first) for axis in (core.rows, core.cols))
    levels = zip(row_levels, col_levels, strict=True)
    return DownWindows(
        Window(rows, cols),
        tuple(tuple(Window(*pair) for pair in zip(*level, strict=True)) for level in levels),
    )


def down_halo(reach: Sequence[DownReach], first: int) -> tuple[int, int]:
    """Pixels that a tile needs before and after those its latents cover, where the picture's edge is far away."""
    far, scale = 1 << 20, 2 ** sum(level.kernel is not None for level in reach)
    pixels, _ = down_spans(Span(far, far + 1, 4 * far), reach, first)
    return far * scale - pixels.start, pixels.stop - (far + 1) * scale
