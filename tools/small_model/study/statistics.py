"""Closure, differences and their intervals: a paired bootstrap over clips and seeds.

A sample draws clips with replacement, and seeds with replacement; all rows that are compared get the same draws. Means
are over points: of a band, the points of the drawn clips that lie in it. Intervals are percentiles of the samples. With
one seed, its interval knows nothing of how seeds differ, and nothing is to be decided by it. Few seeds that are drawn
spread less than seeds do, and their own spread is a guess: a plain bootstrap over three has the truth in 83 of 100
"95 %" intervals where seeds differ more than clips. So their deviations are stretched to Student's interval.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from t3.retrofit.validation import BANDS as NOISE_BANDS

BANDS = {"whole": (-1.0, 2.0), **NOISE_BANDS}
SAMPLES = 4000
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 %, by seeds
_NORMAL = 1.960


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval, and `lower`: the one-sided bound that 95 % of the samples pass.

    seeds: how many it is from.
    """

    value: float
    low: float
    high: float
    lower: float
    seeds: int

    @classmethod
    def of(cls, samples: np.ndarray, seeds: int = 1) -> Estimate:
        """From samples `[1 + n]`, of which the first is the value itself."""
        low, lower, high = np.percentile(samples[1:], (2.5, 5, 97.5))
        return cls(float(samples[0]), float(low), float(high), float(lower), seeds)


@dataclass(frozen=True)
class Draws:
    """How often each clip is taken, and what each seed weighs: `clips` [1 + n, clips], `seeds` [1 + n, seeds].

    The first are one each.
    """

    clips: np.ndarray
    seeds: np.ndarray

    @classmethod
    @lru_cache(maxsize=16)
    def make(cls, clips: int, seeds: int, samples: int = SAMPLES) -> Draws:
        """The same for the same numbers."""
        rng = np.random.default_rng([clips, seeds])
        stretch = _STUDENT.get(seeds, _NORMAL) / _NORMAL * (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else 1.0
        return cls(_counts(rng, clips, samples), 1 + stretch * (_counts(rng, seeds, samples) - 1))

    def mean(self, errors: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Means `[1 + n]` of `errors` [seeds, clips, draws] over the points where `inside` [clips, draws] holds.

        Errors of one seed stand for all seeds: an un-tuned row has one.
        """
        sums = (errors * inside).sum(2)  # [seeds, clips]
        means = (self.clips @ sums.T) / (self.clips @ inside.sum(1))[:, None]
        if means.shape[1] == 1:
            return means[:, 0]
        return (means * self.seeds).sum(1) / self.seeds.sum(1)


def _counts(rng: np.random.Generator, count: int, samples: int) -> np.ndarray:
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=samples)
    return np.concatenate([np.ones((1, count)), drawn]).astype(float)


def in_band(sigma: np.ndarray, band: str) -> np.ndarray:
    """Where noise levels lie in a band; `sigma` in [0, 1]."""
    low, high = BANDS[band]
    return (low <= sigma) & (sigma < high)


@dataclass(frozen=True)
class Curve:
    """A row at one budget beside what it is measured against: errors `[seeds, clips, draws]` at the same points.

    control: dense, trained on for as long, by the same seeds. untuned: one seed.
    """

    row: np.ndarray
    control: np.ndarray
    untuned: np.ndarray
    sigma: np.ndarray
    _samples: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def samples(self, band: str) -> tuple[np.ndarray, np.ndarray]:
        """Samples `[1 + n]` of the un-tuned excess and of the row's: errors less the control's."""
        if band not in self._samples:
            seeds, clips, _ = self.row.shape
            draws, inside = Draws.make(clips, seeds), in_band(self.sigma, band)
            control = draws.mean(self.control, inside)
            self._samples[band] = draws.mean(self.untuned, inside) - control, draws.mean(self.row, inside) - control
        return self._samples[band]

    def gap(self, band: str = "whole") -> Estimate:
        """The un-tuned excess."""
        return Estimate.of(self.samples(band)[0], len(self.row))

    def closures(self, band: str) -> np.ndarray | None:
        """Samples `[1 + n]` of 1 - excess / un-tuned excess; None where there is nothing to close: the interval of the
        un-tuned excess reaches 0, and a ratio to it could be anything."""
        gap, excess = self.samples(band)
        return 1 - excess / gap if self.gap(band).low > 0 else None

    def closure(self, band: str = "whole") -> Estimate | None:
        samples = self.closures(band)
        return None if samples is None else Estimate.of(samples, len(self.row))

    def excess(self, band: str = "whole") -> Estimate:
        return Estimate.of(self.samples(band)[1], len(self.row))


def closure_difference(one: Curve, other: Curve, band: str = "whole") -> Estimate | None:
    """Closure of `one` less that of `other`, clips and seeds drawn together. Both have the same seeds and clips."""
    assert one.row.shape == other.row.shape, (one.row.shape, other.row.shape)
    first, second = one.closures(band), other.closures(band)
    return None if first is None or second is None else Estimate.of(first - second, len(one.row))


def share_difference(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Points of percentage by which `one` is right more often than `other`: `[seeds, prompts]` of True and False.

    The same prompts and sampling noise in both. Prompts are drawn, with all their seeds; seeds are not.
    """
    assert one.shape == other.shape, (one.shape, other.shape)
    by_prompt = 100 * (one.astype(float) - other.astype(float)).mean(0)
    counts = Draws.make(len(by_prompt), 1).clips
    return Estimate.of(counts @ by_prompt / len(by_prompt), len(one))


def interpolated(points: list[tuple[float, float]], at: float) -> float | None:
    """The value at `at`, linear in the logarithm between `(x, value)` points; None outside of them."""
    points = sorted(points)
    if len(points) < 2 or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(np.log(at), np.log([x for x, _ in points]), [value for _, value in points]))
