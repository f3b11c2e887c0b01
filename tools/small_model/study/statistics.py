"""Closure, differences and their intervals: a paired bootstrap over clips and seeds.

A sample draws clips with replacement, and seeds with replacement; all rows that are compared get the same draws. Means
are over points: of a band, the points of the drawn clips that lie in it. Intervals are percentiles of the samples. With
one seed, its interval knows nothing of how seeds differ; with three, little.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from t3.retrofit.validation import BANDS as NOISE_BANDS

BANDS = {"whole": (-1.0, 2.0), **NOISE_BANDS}
SAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval, and `lower`: the one-sided bound that 95 % of the samples pass."""

    value: float
    low: float
    high: float
    lower: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Estimate:
        """From samples `[1 + n]`, of which the first is the value itself."""
        low, lower, high = np.percentile(samples[1:], (2.5, 5, 97.5))
        return cls(float(samples[0]), float(low), float(high), float(lower))


@dataclass(frozen=True)
class Draws:
    """How often each clip and each seed is taken: `clips` [1 + n, clips], `seeds` [1 + n, seeds]. First: once each."""

    clips: np.ndarray
    seeds: np.ndarray

    @classmethod
    @lru_cache(maxsize=16)
    def make(cls, clips: int, seeds: int, samples: int = SAMPLES) -> Draws:
        """The same for the same numbers."""
        rng = np.random.default_rng([clips, seeds])
        return cls(_counts(rng, clips, samples), _counts(rng, seeds, samples))

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
        """Samples `[1 + n]` of closure and of the absolute excess.

        excess = error - control's error; closure = 1 - excess / (un-tuned error - control's error).
        """
        if band in self._samples:
            return self._samples[band]
        seeds, clips, _ = self.row.shape
        draws, inside = Draws.make(clips, seeds), in_band(self.sigma, band)
        control = draws.mean(self.control, inside)
        excess = draws.mean(self.row, inside) - control
        self._samples[band] = 1 - excess / (draws.mean(self.untuned, inside) - control), excess
        return self._samples[band]

    def closure(self, band: str = "whole") -> Estimate:
        return Estimate.of(self.samples(band)[0])

    def excess(self, band: str = "whole") -> Estimate:
        return Estimate.of(self.samples(band)[1])


def closure_difference(one: Curve, other: Curve, band: str = "whole") -> Estimate:
    """Closure of `one` less that of `other`, clips and seeds drawn together. Both have the same seeds and clips."""
    assert one.row.shape == other.row.shape, (one.row.shape, other.row.shape)
    return Estimate.of(one.samples(band)[0] - other.samples(band)[0])


def share_difference(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Points of percentage by which `one` is right more often than `other`: `[seeds, prompts]` of True and False.

    The same prompts and sampling noise in both. Prompts are drawn, with all their seeds; seeds are not.
    """
    assert one.shape == other.shape, (one.shape, other.shape)
    by_prompt = 100 * (one.astype(float) - other.astype(float)).mean(0)
    counts = Draws.make(len(by_prompt), 1).clips
    return Estimate.of(counts @ by_prompt / len(by_prompt))


def interpolated(points: list[tuple[float, float]], at: float) -> float | None:
    """The value at `at`, linear in the logarithm between `(x, value)` points; None outside of them."""
    points = sorted(points)
    if len(points) < 2 or not points[0][0] <= at <= points[-1][0]:
        return None
    return float(np.interp(np.log(at), np.log([x for x, _ in points]), [value for _, value in points]))
