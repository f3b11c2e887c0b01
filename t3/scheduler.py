"""The sampler of the released T3 code: Euler steps of flow matching on shifted sigmas."""

from __future__ import annotations

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler


def released_sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels of the released sampler, `[steps]` in float64: `shift` applied to `linspace(1, 0, steps + 1)[:-1]`.

    The last level, 0, is where the last step lands and is not listed.
    """
    even = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return shift * even / (1 + (shift - 1) * even)


class ReleasedScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-matching Euler steps whose sigmas are `released_sigmas`.

    The stock scheduler spreads its steps down to a smallest sigma of its own and so ends elsewhere (0.024 where the
    release ends at 0.093, with 50 steps and shift 5).
    """

    def __init__(self, shift: float = 5.0) -> None:
        super().__init__(num_train_timesteps=1000, shift=shift)

    def set_timesteps(self, num_inference_steps=None, device=None, **kwargs) -> None:
        """As the parent's, with the sigmas of `num_inference_steps` steps; `shift` is applied by the parent."""
        even = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=even.tolist(), device=device)
