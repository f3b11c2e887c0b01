"""Everything random in training, as a function of the seed and of what it is for: no generator has a state to save.

A run that is resumed, or spread over more processes, draws the same numbers for the same clip of the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

SAMPLE, ORDER, POOL, QUERIES, VALIDATION = range(5)


def generator(seed: int, *what: int) -> np.random.Generator:
    """Numbers that depend on the seed and on `what`: one of the purposes above, and where in the run."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *what])))


@dataclass(frozen=True)
class SampleDraws:
    """What is random for one clip of one step: `u`, `drop` and `condition` uniform in [0, 1), `normal` normal, a seed
    for noise."""

    u: float
    normal: float
    drop: float
    noise: int
    condition: float


def sample_draws(seed: int, serial: int) -> SampleDraws:
    """The draws for the clip number `serial` that a run trains on, counted over all processes and steps."""
    numbers = generator(seed, SAMPLE, serial)
    first = numbers.random(), numbers.standard_normal(), numbers.random(), int(numbers.integers(2**63))
    return SampleDraws(*first, numbers.random())


def noise(seeds: list[int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Normal noise `[len(seeds), *shape]` in float32, each sample from its own seed, drawn on `device`."""
    out = torch.empty(len(seeds), *shape, device=device)
    source = torch.Generator(device)
    for row, seed in zip(out, seeds, strict=True):
        row.normal_(generator=source.manual_seed(seed))
    return out


def shifted(u: float, shift: float) -> float:
    """The noise level that a time shift makes of `u` in [0, 1], as the sampler's schedule does."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(level: float, shift: float) -> float:
    """The `u` in [0, 1] of which `shifted` makes this noise level."""
    return level / (shift - (shift - 1) * level)


def noise_level(draws: SampleDraws, kind: str, shift: float, low: float, high: float) -> float:
    """A noise level: `u` or the logistic of `normal`, shifted; of all these, those that lie in [low, high]."""
    first, last = unshifted(low, shift), unshifted(high, shift)
    if kind == "uniform":
        return shifted(first + (last - first) * draws.u, shift)
    normal = draws.normal
    if (first, last) != (0.0, 1.0):
        # The same place in the part of the distribution between the two: its quantiles, not its values, are squeezed.
        unit = NormalDist()
        below, above = (unit.cdf(_logit(u)) for u in (first, last))
        normal = unit.inv_cdf(min(max(below + (above - below) * unit.cdf(normal), 1e-12), 1 - 1e-12))
    return shifted(1 / (1 + float(np.exp(-normal))), shift)


def _logit(u: float) -> float:
    return float(np.log(u) - np.log1p(-u)) if 0 < u < 1 else (np.inf if u >= 1 else -np.inf)
