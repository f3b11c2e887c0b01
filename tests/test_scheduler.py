"""The sampler's noise levels against the released sampler's definition."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from t3.scheduler import ReleasedScheduler, released_sigmas


def by_definition(steps, shift):
    """One level at a time: the released sampler starts at 1, goes down evenly to just above 0, then shifts."""
    levels = []
    for i in range(steps):
        even = 1 - i / steps
        levels.append(shift * even / (1 + (shift - 1) * even))
    return np.array(levels)


@pytest.mark.parametrize("steps", [1, 4, 8, 20, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_sigmas_are_the_released_ones(steps, shift):
    scheduler = ReleasedScheduler(shift)
    scheduler.set_timesteps(steps, device="cpu")
    expected = by_definition(steps, shift)
    assert np.abs(scheduler.sigmas[:-1].numpy() - expected).max() < 1e-6
    assert scheduler.sigmas[-1] == 0
    assert np.abs(scheduler.timesteps.numpy() - 1000 * expected).max() < 1e-3
    assert np.abs(released_sigmas(steps, shift) - expected).max() < 1e-12


def test_the_last_step_starts_where_the_release_s_does_and_the_stock_one_does_not():
    released = ReleasedScheduler(5.0)
    released.set_timesteps(50)
    stock = FlowMatchEulerDiscreteScheduler(shift=5.0)
    stock.set_timesteps(50)
    assert released.sigmas[-2].item() == pytest.approx(0.0926, abs=1e-4)
    assert stock.sigmas[-2].item() == pytest.approx(0.0244, abs=1e-3)


def test_a_step_is_euler_s():
    scheduler = ReleasedScheduler(5.0)
    scheduler.set_timesteps(10)
    sigmas = [*by_definition(10, 5.0).tolist(), 0.0]
    sample = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.randn(sample.shape, generator=torch.Generator().manual_seed(i + 1))
        expected = sample + (sigmas[i + 1] - sigmas[i]) * velocity
        sample = scheduler.step(velocity, t, sample, return_dict=False)[0]
        assert torch.allclose(sample, expected, atol=1e-6)
