"""Which tokens attend which: grids, partitions of a grid into windows, and plans of partitions over layers.

Pure Python, no torch. The method is that of "Transform Trained Transformer" (arXiv 2512.13492), section 3; the
window counts of the two presets are those of the authors' released inference code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .errors import T3Error

EACH = "each"
AxisCount = int | str
JSON_VERSION = 1
AXES = ("t", "h", "w")
VIDEO_FRAMES_PER_LATENT = 4


class Grid(NamedTuple):
    """Tokens along time, height and width after patch embedding. Token index is `(t*H + h)*W + w`."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    @classmethod
    def from_video(cls, frames: int, height: int, width: int, pixels_per_token: int) -> Grid:
        """The grid of a clip of `frames` x `height` x `width` pixels.

        `pixels_per_token` is VAE scale times patch: 16 for Wan2.1 and A14B, 32 for Wan2.2 5B.
        Raises `T3Error` naming the nearest legal value when a size cannot be patched.
        """
        k = VIDEO_FRAMES_PER_LATENT
        if frames < 1 or (frames - 1) % k:
            near = max(1, round((frames - 1) / k) * k + 1)
            raise T3Error(f"frames is {frames}; Wan needs {k}n+1 frames (1, 5, 9, ... 81). Nearest: {near}.")
        for name, value in (("height", height), ("width", width)):
            if value < pixels_per_token or value % pixels_per_token:
                near = max(1, round(value / pixels_per_token)) * pixels_per_token
                raise T3Error(
                    f"{name} is {value}; this model needs a multiple of {pixels_per_token} pixels. Nearest: {near}."
                )
        return cls((frames - 1) // k + 1, height // pixels_per_token, width // pixels_per_token)


def axis_classes(length: int, count: int) -> tuple[tuple[int, int], ...]:
    """How an axis of `length` falls into `count` groups: `((how many, how long), ...)`, the longer ones first.

    The same for local groups (those of `numpy.array_split`) and strided groups (residues modulo `count`).
    One entry when `count` divides `length`, otherwise two.
    """
    short, longer = divmod(length, count)
    classes = ((longer, short + 1), (count - longer, short))
    return tuple((n, size) for n, size in classes if n)


class Partition(NamedTuple):
    """Window counts of one layer along time, height and width."""

    t: int
    h: int
    w: int

    @property
    def windows(self) -> int:
        """Windows in one grouping (local or strided)."""
        return self.t * self.h * self.w

    def check(self, grid: Grid) -> None:
        """Raise `T3Error` unless every count lies between 1 and its axis's length."""
        for axis, count, length in zip(AXES, self, grid, strict=True):
            if not 1 <= count <= length:
                near = min(max(count, 1), length)
                raise T3Error(
                    f"{count} windows along {axis} do not fit a grid of {tuple(grid)} tokens: "
                    f"use 1 to {length}. Nearest: {near}."
                )

    def coincides(self, grid: Grid) -> bool:
        """True when local and strided windows are the same sets of tokens, so that one branch is enough."""
        return all(count in (1, length) for count, length in zip(self, grid, strict=True))

    def window_classes(self, grid: Grid) -> list[tuple[int, int]]:
        """`[(how many windows, tokens in each), ...]` of one grouping: at most 8 entries."""
        per_axis = [axis_classes(length, count) for length, count in zip(grid, self, strict=True)]
        return [
            (nt * nh * nw, lt * lh * lw) for nt, lt in per_axis[0] for nh, lh in per_axis[1] for nw, lw in per_axis[2]
        ]

    def window_lengths(self, grid: Grid) -> tuple[int, ...]:
        """The tokens in a window, for each of the `window_classes`."""
        return tuple(tokens for _, tokens in self.window_classes(grid))


class Layer(NamedTuple):
    """One layer's counts as a plan states them: a number, or `"each"` for as many windows as the axis is long."""

    t: AxisCount
    h: AxisCount
    w: AxisCount


def _layer(entry: object, where: str) -> Layer:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise T3Error(f'{where} is {entry!r}; expected three counts [t, h, w], each a number or "{EACH}".')
    for axis, value in zip(AXES, entry, strict=True):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_count and value != EACH:
            raise T3Error(f'{where}, axis {axis}, is {value!r}; expected a whole number of at least 1, or "{EACH}".')
    return Layer(*entry)


@dataclass(frozen=True)
class Plan:
    """A schedule of partitions, cycled over the model's layers, written for one grid and good for any.

    `grid` is the grid the counts were chosen (and the weights tuned) for; `layers` one entry per layer of the cycle.
    """

    name: str
    grid: Grid
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        grid = _check_grid(self.grid)
        if not self.layers:
            raise T3Error(f"plan {self.name!r} has no layers; give at least one [t, h, w].")
        layers = tuple(_layer(entry, f"layer {i} of plan {self.name!r}") for i, entry in enumerate(self.layers))
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "layers", layers)
        for i, layer in enumerate(layers):
            try:
                _counts(layer, grid).check(grid)
            except T3Error as error:
                raise T3Error(f"layer {i} of plan {self.name!r}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> Plan:
        """`"wan2.1-4k"` (Wan2.1, 16-channel latents), `"wan2.2-4k"` (Wan2.2 5B, 48 channels), or `"dense"`."""
        try:
            return PRESETS[name]
        except KeyError:
            raise T3Error(f"unknown plan {name!r}; presets are {', '.join(PRESETS)}, or pass a plan's JSON.") from None

    @classmethod
    def for_latent_channels(cls, channels: int) -> Plan:
        """The preset whose tokens cover as many pixels as those of a model with this many latent channels."""
        return PRESETS["wan2.2-4k" if channels == 48 else "wan2.1-4k"]

    def partition(self, layer: int, grid: Sequence[int]) -> Partition:
        """The partition of one layer (counted from 0, cycled) on `grid`; always legal for that grid.

        On the plan's own grid: the stated counts, exactly. An axis that says `"each"` gets its length anywhere.
        On another grid a layer keeps its *windows*, not its counts: among all counts, those whose windows have
        0.5-2 times the tokens they have on the plan's grid (where the grid is large enough to allow it) and whose
        extent along each axis is nearest, in octaves, to the original extent; an axis that was whole (count 1) stays
        whole as far as the token bound allows. Counts that divide the axis win over near ones that do not. Height
        stays height and width stays width in portrait, since the weights were tuned with that orientation.
        A grid smaller than half a window is one window, i.e. dense; a dense layer stays dense. A layer with an
        `"each"` axis has no token bound (one frame per window is what it means), and its other axes keep their
        windows' extent.
        """
        return _adapt(self.layers[layer % len(self.layers)], self.grid, _check_grid(grid))

    def partitions(self, grid: Sequence[int], layers: int) -> list[Partition]:
        """The partitions of layers 0 to `layers - 1` on `grid`."""
        return [self.partition(i, grid) for i in range(layers)]

    def window_lengths(self, grid: Sequence[int], layers: int) -> tuple[int, ...]:
        """The tokens in a window, for each class of each of these layers."""
        return tuple(n for layer in self.partitions(grid, layers) for n in layer.window_lengths(Grid(*grid)))

    def to_json(self) -> str:
        """JSON text with a version field; `Plan.from_json` gives an equal plan back."""
        content = {"t3_plan": JSON_VERSION, "name": self.name, "grid": self.grid, "layers": self.layers}
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` writes. Raises `T3Error` naming what is wrong and where."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise T3Error(f"the plan is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
        if not isinstance(content, dict) or "t3_plan" not in content:
            raise T3Error('the plan has no "t3_plan" field; expected an object like {"t3_plan": 1, "grid": ...}.')
        version = content["t3_plan"]
        if version != JSON_VERSION:
            raise T3Error(f"the plan has version {version!r}; this release reads version {JSON_VERSION}.")
        unknown = sorted(set(content) - {"t3_plan", "name", "grid", "layers"})
        if unknown:
            raise T3Error(f"the plan has unknown fields {unknown}; known are name, grid, layers.")
        missing = [field for field in ("grid", "layers") if field not in content]
        if missing:
            raise T3Error(f"the plan lacks the field {missing[0]!r}.")
        layers = content["layers"]
        if not isinstance(layers, list):
            raise T3Error(f"the plan's layers are {layers!r}; expected a list of [t, h, w].")
        name = content.get("name", "custom")
        if not isinstance(name, str):
            raise T3Error(f"the plan's name is {name!r}; expected text.")
        return cls(name, content["grid"], tuple(layers))


def _check_grid(grid: object) -> Grid:
    if not isinstance(grid, (list, tuple)) or len(grid) != 3:
        raise T3Error(f"the grid is {grid!r}; expected three numbers [t, h, w].")
    for axis, value in zip(AXES, grid, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise T3Error(f"the grid's {axis} is {value!r}; expected a whole number of at least 1.")
    return Grid(*grid)


def _counts(layer: Layer, grid: Grid) -> Partition:
    return Partition(*(length if n == EACH else int(n) for n, length in zip(layer, grid, strict=True)))


def _candidates(length: int) -> list[int]:
    """One count for every possible longest group: the smallest, which is the most even. Holds every divisor."""
    smallest: dict[int, int] = {}
    for count in range(1, length + 1):
        smallest.setdefault(math.ceil(length / count), count)
    return list(smallest.values())


# Octaves of extent that a count not dividing its axis must win by: uneven windows cost extra launches, no accuracy.
_UNEVEN = 0.02
# The token bound, relative to the window on the plan's own grid.
_LEAST, _MOST = 0.5, 2.0


@lru_cache(maxsize=4096)
def _adapt(layer: Layer, home: Grid, grid: Grid) -> Partition:
    if grid == home or layer == (1, 1, 1):
        return _counts(layer, grid)
    wanted = [length if n == 1 else home_length / n for n, length, home_length in _axes(layer, grid, home)]
    counts = [[length] if n == EACH else _candidates(length) for n, length in zip(layer, grid, strict=True)]
    options = [_axis_options(grid[axis], counts[axis], wanted[axis]) for axis in range(3)]
    target = math.inf if EACH in layer else home.tokens / _counts(layer, home).windows

    def rank(choice: Iterable[tuple[int, int, int, float]]) -> tuple[float, float]:
        longest = shortest = 1
        octaves = 0.0
        for _, long, short, cost in choice:
            longest, shortest, octaves = longest * long, shortest * short, octaves + cost
        if math.isinf(target):
            return 0.0, octaves
        out_of_bounds = max(0.0, math.log2(longest / (target * _MOST)), math.log2(target * _LEAST / shortest))
        return out_of_bounds, octaves

    best = min(((a, b, c) for a in options[0] for b in options[1] for c in options[2]), key=rank)
    return Partition(*(option[0] for option in best))


def _axes(layer: Layer, grid: Grid, home: Grid) -> list[tuple[int, int, int]]:
    """`(count on the plan's grid, length here, length on the plan's grid)` for each axis."""
    return list(zip(_counts(layer, home), grid, home, strict=True))


def _axis_options(length: int, counts: list[int], wanted: float) -> list[tuple[int, int, int, float]]:
    """`(count, longest group, shortest group, cost)` for each; cost is the squared change of extent in octaves."""
    return [
        (
            count,
            math.ceil(length / count),
            length // count,
            math.log2(length / count / wanted) ** 2 + (_UNEVEN if length % count else 0.0),
        )
        for count in counts
    ]


PRESETS = {
    plan.name: plan
    for plan in (
        Plan(
            "wan2.1-4k",
            Grid(21, 136, 240),
            (Layer(EACH, 1, 1), Layer(1, 17, 30), Layer(1, 8, 40), Layer(3, 17, 8), Layer(7, 8, 6)),
        ),
        Plan(
            "wan2.2-4k",
            Grid(21, 68, 120),
            (Layer(EACH, 1, 1), Layer(1, 17, 20), Layer(1, 17, 6), Layer(3, 4, 15), Layer(7, 4, 8)),
        ),
        Plan("dense", Grid(1, 1, 1), (Layer(1, 1, 1),)),
    )
}
