"""Which tokens one token attends in a layer: an outer product of what it attends along each axis. No torch import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .errors import T3Error
from .plan import AXES, Grid, Partition, axis_classes


class Axis(NamedTuple):
    """Positions of one axis that share the token's group: bool `[length]` for local and for strided groups."""

    local: np.ndarray
    strided: np.ndarray

    @property
    def both(self) -> np.ndarray:
        return self.local & self.strided


def attended_axis(length: int, count: int, position: int) -> Axis:
    """What a token at `position` of an axis of `length`, cut into `count` groups, attends along it."""
    positions = np.arange(length)
    start = 0
    for groups, size in axis_classes(length, count):
        if position < start + groups * size:
            start += (position - start) // size * size
            break
        start += groups * size
    local = (positions >= start) & (positions < start + size)
    return Axis(local, positions % count == position % count)


def attended(grid: Grid, partition: Partition, token: Sequence[int]) -> tuple[Axis, Axis, Axis]:
    """What `token` `(t, h, w)` attends along time, height and width.

    It attends the tokens that are `local` on all three axes, and those that are `strided` on all three. Raises
    `T3Error` for a token outside the grid.
    """
    for name, position, length in zip(AXES, token, grid, strict=True):
        if not 0 <= position < length:
            near = min(max(position, 0), length - 1)
            raise T3Error(f"the token's {name} is {position}; this grid has 0 to {length - 1}. Nearest: {near}.")
    partition.check(grid)
    t, h, w = (attended_axis(*axis) for axis in zip(grid, partition, token, strict=True))
    return t, h, w


def attended_count(axes: Sequence[Axis]) -> int:
    """How many different tokens that is, the token itself included."""
    local, strided, both = (
        int(np.prod([getattr(axis, kind).sum() for axis in axes])) for kind in ("local", "strided", "both")
    )
    return local + strided - both


def token_at(grid: Grid, fractions: Sequence[float]) -> tuple[int, int, int]:
    """The token at `fractions` (0 first, 1 last) of time, height and width. Raises `T3Error` outside 0 to 1."""
    for name, fraction in zip(("time", "height", "width"), fractions, strict=True):
        if not 0 <= fraction <= 1:
            near = min(max(fraction, 0), 1) if fraction == fraction else 0
            raise T3Error(f"the token's place in {name} is {fraction:g}; give 0 (first) to 1 (last). Nearest: {near}.")
    t, h, w = (min(int(fraction * length), length - 1) for fraction, length in zip(fractions, grid, strict=True))
    return t, h, w
