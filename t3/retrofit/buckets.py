"""Which size and length a clip is encoded at: the bucket that keeps most of it, among those asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import T3Error
from ..plan import Grid

_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Bucket:
    """A size in pixels and a number of frames that clips are brought to."""

    height: int
    width: int
    frames: int


class NoBucket(T3Error):
    """A clip is too small or too short for every bucket; the message says by how much."""


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from "448x640". Raises `T3Error` for other text."""
    found = _SIZE.fullmatch(text.lower())
    if not found:
        raise T3Error(f"--size {text!r} is no size; write HEIGHTxWIDTH, such as 480x832.")
    return int(found[1]), int(found[2])


def check_buckets(sizes: Sequence[tuple[int, int]], frames: Sequence[int], pixels_per_token: int) -> None:
    """Raise `T3Error` naming the nearest legal value unless the model can be trained on every bucket."""
    for height, width in sizes:
        for count in frames:
            Grid.from_video(count, height, width, pixels_per_token)


def choose(
    height: int, width: int, frames: int, sizes: Sequence[tuple[int, int]], lengths: Sequence[int], upscale: bool
) -> Bucket:
    """The bucket for a clip: nearest in shape (height to width), then largest; as long as the clip allows.

    A clip is scaled and cropped to its bucket, and never enlarged unless `upscale`. Raises `NoBucket`.
    """
    long_enough = [length for length in lengths if length <= frames]
    if not long_enough:
        raise NoBucket(f"it has {frames} frames, and the shortest clips asked for have {min(lengths)}")
    fits = [size for size in sizes if upscale or (size[0] <= height and size[1] <= width)]
    if not fits:
        smallest = min(sizes, key=lambda size: size[0] * size[1])
        raise NoBucket(f"it is {height}x{width}, smaller than {smallest[0]}x{smallest[1]} (--upscale would enlarge it)")

    def rank(size: tuple[int, int]) -> tuple[float, int]:
        apart = abs(math.log((size[0] / size[1]) / (height / width)))
        return round(apart, 3), -size[0] * size[1]

    best = min(fits, key=rank)
    return Bucket(*best, max(long_enough))
