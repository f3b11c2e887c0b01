"""Everything random in training, as a function of the seed and of what it is for: no generator has a state to save.

A run that is resumed, or spread over more processes, draws the same numbers for the same clip of the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SAMPLE, ORDER, POOL, QUERIES, VALIDATION = range(5)


def generator(seed: int, *what: int) -> np.random.Generator:
    """Numbers that depend on the seed and on `what`: one of the purposes above, and where in the run."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *what])))


@dataclass(frozen=True)
class SampleDraws:
    """What is random for one clip of one step: `u` and `drop` uniform in [0, 1), `normal` normal, a seed for noise."""

    u: float
    normal: float
    drop: float
    noise: int


def sample_draws(seed: int, serial: int) -> SampleDraws:
    """The draws for the clip number `serial` that a run trains on, counted over all processes and steps."""
    numbers = generator(seed, SAMPLE, serial)
    return SampleDraws(numbers.random(), numbers.standard_normal(), numbers.random(), int(numbers.integers(2**63)))


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


def noise_level(draws: SampleDraws, kind: str, shift: float, low: float, high: float) -> float:
    """A noise level in [low, high]: `u` or the logistic of `normal`, shifted."""
    u = draws.u if kind == "uniform" else 1 / (1 + float(np.exp(-draws.normal)))
    return low + (high - low) * shifted(u, shift)
