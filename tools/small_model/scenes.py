"""The world as data: what a clip shows, drawn from a seed. Clip i of a split is the same on every machine.

Lengths are in units of the frame's height; (0, 0) is the middle of the frame, x to the right, y down; angles in
degrees, clockwise on the screen; time in frames. Frames are 10:7 (448x640 and 224x320).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "yellow": (0.92, 0.82, 0.10),
    "green": (0.10, 0.68, 0.18),
    "cyan": (0.10, 0.76, 0.84),
    "blue": (0.14, 0.22, 0.90),
    "purple": (0.72, 0.14, 0.82),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"black": 0.05, "gray": 0.5, "white": 0.95}
# The diameter scale: every shape of a size covers `AREA * size ** 2`, so that size can be read off the area alone.
SIZES = {"small": 0.18, "large": 0.30}
AREA = 0.7
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "turning": (0, 0)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SPEED = 0.014  # per frame
TURN = 4.5  # degrees per frame
LONGEST = 21  # frames a scene is certain to stay in view for
ASPECT = 10 / 7
# Markers run in a strip along the left and the right edge; everything else stays between the strips.
STRIP = 0.14
MARKER_RADIUS = 0.06
MARKER_REACH = 0.40
MARKER_SPEED = 0.024
# Farthest corner from the centre, per unit of size, given the areas above.
RADII = {
    "circle": math.sqrt(AREA / math.pi),
    "square": math.sqrt(AREA / 2),
    "triangle": math.sqrt(4 * AREA / (3 * math.sqrt(3))),
    "cross": math.sqrt(AREA / 2),
}
SPLITS = {"train": 1, "test": 2, "held": 3, "tune": 4, "hard": 5}
# How many scenes of the split "hard", which is to train on, are made to be pairs, and how many three things: what is
# learnt last. What a caption leaves open is what it is in "train", so a model learns the same clips for a caption.
_HARD_PAIRS, _HARD_THREES = 0.35, 0.12
# Never seen in training: a thing of this colour and shape, and a shape with this motion.
HELD_THINGS = frozenset({("yellow", "triangle"), ("cyan", "cross"), ("purple", "circle")})
HELD_MOTIONS = frozenset({("square", "up"), ("cross", "left")})
_MARGIN = 0.02
_GAP = 0.05  # between two things that stand in line
_PAIR_REACH = (0.17, 0.28)  # how far two related things are from the frame's middle, half way through the clip
_LINES = ((1, 0), (0, 1))
_PAIR_SHARE = 0.3
_SAID = {"size": 0.7, "background": 0.7, "motion": 0.9}


@dataclass(frozen=True)
class Thing:
    """One shape: its colour and where its centre is at frame 0."""

    shape: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Marker:
    """The pair of markers no caption names: one hue (0 to 1), one height and one speed for both edges."""

    hue: float
    y: float
    speed: float


@dataclass(frozen=True)
class Scene:
    """A clip's contents. All things share size and motion. `relation` (of the first thing to the second) or None.

    `said` names those of size, background and motion that the caption states.
    """

    things: tuple[Thing, ...]
    size: str
    motion: str
    background: str
    relation: str | None
    marker: Marker
    said: frozenset[str]

    @property
    def held_out(self) -> bool:
        """Whether it shows a combination that training never does."""
        return any(
            (thing.colour, thing.shape) in HELD_THINGS or (thing.shape, self.motion) in HELD_MOTIONS
            for thing in self.things
        )


def scene(split: str, index: int) -> Scene:
    """Scene `index` of a split: "held" shows held-out combinations and nothing else, all others none."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS[split], index])))
    kind = rng.random() if split == "hard" else 1.0
    while True:
        found = _draw(rng)
        if found.held_out != (split == "held"):
            continue
        if kind < _HARD_PAIRS and found.relation is None:
            continue
        if _HARD_PAIRS <= kind < _HARD_PAIRS + _HARD_THREES and len(found.things) != 3:
            continue
        return found


def scenes(split: str, start: int, count: int) -> list[Scene]:
    """Scenes `start` to `start + count - 1` of a split."""
    return [scene(split, i) for i in range(start, start + count)]


def _draw(rng: np.random.Generator) -> Scene:
    pair = rng.random() < _PAIR_SHARE
    motion = _pick(rng, MOTIONS)
    relation = _pick(rng, RELATIONS) if pair else None
    if pair:
        colours = rng.permutation(list(COLOURS))[:2].tolist()
        shapes = [_pick(rng, SHAPES) for _ in range(2)]
        size = "small"
    else:
        count = int(rng.integers(1, 4))
        colours = [_pick(rng, COLOURS)] * count
        shapes = [_pick(rng, SHAPES)] * count
        size = _pick(rng, SIZES) if count < 3 else "small"
    if motion == "turning" and "circle" in shapes:
        motion = "still"
    radius = max(RADII[shape] * SIZES[size] for shape in shapes)
    places = _related(rng, radius, motion, relation) if relation else _alike(rng, radius, motion, len(shapes))
    background = _pick(rng, BACKGROUNDS)
    said = frozenset(name for name, share in _SAID.items() if rng.random() < share)
    things = tuple(Thing(*each, *place) for *each, place in zip(shapes, colours, places, strict=True))
    return Scene(things, size, motion, background, relation, _marker(rng), said)


def _pick(rng: np.random.Generator, options) -> str:
    options = list(options)
    return options[int(rng.integers(len(options)))]


def _alike(rng, radius: float, motion: str, count: int) -> list[tuple[float, float]]:
    """Centres at frame 0 of things that stand in line across their way, at equal distances.

    Were they anywhere, a model of this size would still miscount threes and mix up pairs after an hour of training.
    """
    line = np.array({"left": (0, 1), "right": (0, 1), "up": (1, 0), "down": (1, 0)}.get(motion) or _pick(rng, _LINES))
    steps = (np.arange(count) - (count - 1) / 2) * (2 * radius + _GAP)
    room = _room(radius, motion) - steps[-1] * line
    return _at_start(rng.uniform(-room, room) + steps[:, None] * line, motion)


def _related(rng, radius: float, motion: str, relation: str) -> list[tuple[float, float]]:
    """Centres at frame 0 of two things in line, each on its side of the frame's middle all along."""
    axis, room = np.array(RELATIONS[relation]), _room(radius, motion)
    least, most = _PAIR_REACH
    reach = rng.uniform(least, min(most, room @ abs(axis)))
    across = rng.uniform(-room, room) * (1 - abs(axis))
    return _at_start(np.stack((across + reach * axis, across - reach * axis)), motion)


def _travel(motion: str) -> np.ndarray:
    return np.array(MOTIONS[motion]) * SPEED * (LONGEST - 1)


def _room(radius: float, motion: str) -> np.ndarray:
    """How far from the frame's middle a centre may be half way, so that nothing leaves within `LONGEST` frames."""
    return np.array([ASPECT / 2 - STRIP, 0.5 - _MARGIN]) - radius - abs(_travel(motion)) / 2


def _at_start(half_way: np.ndarray, motion: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in half_way - _travel(motion) / 2]


def _marker(rng: np.random.Generator) -> Marker:
    speed = rng.uniform(-MARKER_SPEED, MARKER_SPEED)
    travel = speed * (LONGEST - 1)
    y = rng.uniform(-MARKER_REACH - min(travel, 0), MARKER_REACH - max(travel, 0))
    return Marker(float(rng.random()), float(y), float(speed))
