"""ComfyUI's euler, simple, shift 5, as in the workflows, is the release's sampler: the same noise, the same levels."""

import pytest
import torch

from t3.scheduler import ReleasedScheduler, released_sigmas

SHIFT = 5.0


def host_sigmas(steps):
    """The noise levels of KSampler with scheduler `simple` behind the ModelSamplingSD3 node, the final 0 included."""
    import comfy.samplers
    import host_models
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patcher = host_models.patcher("t2v", num_layers=1)
    (shifted,) = ModelSamplingSD3().patch(patcher, SHIFT)
    return comfy.samplers.calculate_sigmas(shifted.get_model_object("model_sampling"), "simple", steps)


@pytest.mark.parametrize("steps", [50, 40, 25, 20, 10, 8])
def test_noise_levels_equal_the_releases_where_steps_divide_1000(pack, steps):
    sigmas = host_sigmas(steps)
    assert sigmas.shape == (steps + 1,) and sigmas[-1] == 0
    expected = torch.from_numpy(released_sigmas(steps, SHIFT))
    assert (sigmas[:-1].double() - expected).abs().max() < 1e-6


def test_other_steps_are_off_as_the_notes_say(pack):
    """Else the advice to keep steps that divide 1000 would be pointless."""
    difference = (host_sigmas(30)[:-1].double() - torch.from_numpy(released_sigmas(30, SHIFT))).abs().max()
    assert 1e-4 < difference < 1e-2


def test_noise_is_drawn_on_the_cpu_in_float32(pack):
    import comfy.sample

    seed = 2**40 + 7
    for shape in ((1, 16, 3, 8, 6), (1, 48, 2, 4, 4)):
        found = comfy.sample.prepare_noise(torch.zeros(shape), seed)
        expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_step_is_the_headless_engines(pack):
    """Euler in ComfyUI and ours, from the same noise with the same (made up) model: the same latents to rounding."""
    import comfy.k_diffusion.sampling

    generator = torch.Generator().manual_seed(3)
    noise, pull = (torch.randn(1, 16, 2, 4, 4, generator=generator) for _ in range(2))
    steps = 10
    sigmas = host_sigmas(steps)

    def velocity(x, sigma):
        return torch.tanh(x) * sigma + pull

    found = comfy.k_diffusion.sampling.sample_euler(
        lambda x, sigma, **_: x - sigma.view(-1, 1, 1, 1, 1) * velocity(x, sigma.view(-1, 1, 1, 1, 1)),
        noise * sigmas[0],
        sigmas,
        disable=True,
    )
    scheduler = ReleasedScheduler(SHIFT)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.sigmas[0]
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
    assert (found - x).norm() < 1e-5 * x.norm()
    assert (found - noise).norm() > 0.1 * noise.norm()
