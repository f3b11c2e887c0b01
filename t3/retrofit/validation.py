"""The error on held-out clips at fixed noise: the same clips, levels and noise for every run that is compared.

Each clip is measured at `draws` of the `levels` strata of [0, 1], evenly apart; where they begin goes on from clip to
clip by about 0.62 of the range, so that a few clips cover it and `levels` clips cover it evenly. The point in the
stratum and the noise depend on the seed, the clip's number and the draw alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import atomic_path
from .config import Stage, Validation
from .data import Reference
from .draws import VALIDATION, generator, noise, shifted, unshifted
from .objectives import Batch

if TYPE_CHECKING:
    from .session import Session

BANDS = {"low": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high": (2 / 3, 1.001)}


@dataclass(frozen=True)
class Point:
    """One measurement to make: which held-out clip, which of its draws, at what noise level, with which noise; and a
    number in [0, 1) that decides what the model is given."""

    clip: int
    draw: int
    sigma: float
    noise: int
    condition: float


@dataclass(frozen=True)
class Measured:
    """Velocity errors by point. `summary` has the mean over all points and over those of each band of noise."""

    points: list[Point]
    errors: list[float]

    @property
    def summary(self) -> dict[str, float]:
        found = {"whole": _mean(self.errors)}
        for name, (low, high) in BANDS.items():
            pairs = zip(self.points, self.errors, strict=True)
            found[name] = _mean([error for point, error in pairs if low <= point.sigma < high])
        return found

    def write(self, path: Path, clips: Sequence[Reference]) -> None:
        """A CSV line for every point, for statistics over pairs of runs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, overwrite=True) as temp, temp.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("clip", "draw", "sigma", "error", "source"))
            for point, error in zip(self.points, self.errors, strict=True):
                source = clips[point.clip].stored.facts.source
                writer.writerow((point.clip, point.draw, f"{point.sigma:.6f}", f"{error:.8g}", source))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def points(clips: int, asked: Validation, low: float = 0.0, high: float = 1.0) -> list[Point]:
    """What is measured on so many clips, at noise levels in [low, high]."""
    found, stride = [], _stride(asked.levels)
    first, last = unshifted(low, asked.shift), unshifted(high, asked.shift)
    for clip in range(clips):
        for draw in range(asked.draws):
            numbers = generator(asked.seed, VALIDATION, clip, draw)
            stratum = (clip * stride + draw * asked.levels // asked.draws) % asked.levels
            u = first + (last - first) * (stratum + numbers.random()) / asked.levels
            seed = int(numbers.integers(2**63))
            found.append(Point(clip, draw, shifted(u, asked.shift), seed, numbers.random()))
    return found


def _stride(levels: int) -> int:
    """The number without a common divisor with `levels` that is nearest to 0.618 of it."""
    return min((n for n in range(1, levels + 1) if math.gcd(n, levels) == 1), key=lambda n: abs(n - 0.618 * levels))


@torch.no_grad()
def warm_up(session: Session, asked: Validation) -> None:
    """Run one round for each size of clip: compiling and choosing kernels is then done."""
    seen = set()
    for point in _points(session, asked):
        shape = session.clips.held_out[point.clip].stored.latents
        if shape not in seen:
            seen.add(shape)
            batch = _batch(session, [point] * _size(session, asked))
            session.objective.eval()
            session.objective(batch, Stage(), per_clip=True)
            session.objective.train()


def _points(session: Session, asked: Validation) -> list[Point]:
    """What is measured of this run's held-out clips, at the noise that its transformer is for."""
    there = len(session.clips.held_out)
    return points(min(there, asked.clips) if asked.clips else there, asked, *session.found.noise_range)


def _size(session: Session, asked: Validation) -> int:
    """Clips that a process measures at once."""
    return asked.batch or 2 * session.config.train.batch


@torch.no_grad()
def measure(session: Session, asked: Validation) -> Measured:
    """Measure the averaged weights (if there are any) with the plan's own operator. Every process takes its share."""
    operator = session.operator
    chosen = _points(session, asked)
    was = operator.windows, operator.mean
    operator.windows, operator.mean = 1.0, None
    session.objective.eval()
    if session.average is not None:
        session.average.swap()
    try:
        errors = _errors(session, chosen, _size(session, asked))
    finally:
        if session.average is not None:
            session.average.swap()
        session.objective.train()
        operator.windows, operator.mean = was
    return Measured(chosen, errors)


def _errors(session: Session, chosen: list[Point], size: int) -> list[float]:
    accelerator, clips = session.accelerator, session.clips.held_out
    together = size * accelerator.num_processes
    rounds: list[list[int]] = []
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, point in enumerate(chosen):
        by_shape.setdefault(clips[point.clip].stored.latents, []).append(number)
    for numbers in by_shape.values():
        rounds += [numbers[start : start + together] for start in range(0, len(numbers), together)]
    found = torch.zeros(len(chosen), dtype=torch.float64, device=accelerator.device)
    for numbers in rounds:
        # All processes take part in every round; those left without a point measure the round's first for nothing.
        own = numbers[accelerator.process_index * size :][:size]
        batch = _batch(session, [chosen[number] for number in own or numbers[:1]])
        errors = session.objective(batch, Stage(), per_clip=True)
        if own:
            found[torch.tensor(own, device=found.device)] = errors.double()
    return accelerator.reduce(found, "sum").tolist()


def _batch(session: Session, some: list[Point]) -> Batch:
    device, conditioning = session.accelerator.device, session.clips.conditioning
    loaded = [session.held_out(point.clip) for point in some]
    clips = {name: torch.stack([clip[name] for clip in loaded]) for name in loaded[0]}
    grey = session.clips.held_out[some[0].clip].grey(device) if conditioning.takes_grey else None
    given = conditioning.given(clips, grey, [conditioning.choose(point.condition) for point in some])
    sigma = torch.tensor([point.sigma for point in some], device=device)
    drawn = noise([point.noise for point in some], clips["latents"].shape[1:], device)
    return Batch(clips["latents"], clips["text"], drawn, sigma, given=given)
