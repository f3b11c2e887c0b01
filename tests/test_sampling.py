"""The engine's sampling against the released sampler written out by hand."""

import hashlib
import itertools

import pytest
import torch

from t3.generate import NEGATIVE_PROMPT
from t3.jobs import Clip, Options
from t3.pipeline import Engine
from t3.plan import Grid, Plan
from t3.sources import find_sources


def load(model, dtype):
    options = Options(dtype=dtype, device="cpu")
    return Engine.load(find_sources(model=str(model)), Plan.preset("wan2.1-4k"), options, Grid(2, 4, 6), print)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@torch.no_grad()
def test_noise_levels_guidance_and_steps_are_the_released_ones(tiny_model, dtype, cfg):
    """Noise from a CPU generator in float32; velocity of prompt and negative prompt, mixed and stepped in float32."""
    engine = load(tiny_model, dtype)
    clip = Clip("a kite", NEGATIVE_PROMPT, 64, 96, 5, 4, cfg, 11)
    pipe, transformer = engine.pipe, engine.pipe.transformer
    positive, negative = pipe.encode_prompt(clip.prompt, clip.negative, max_sequence_length=512)

    latents = torch.randn(1, 16, 2, 8, 12, generator=torch.Generator("cpu").manual_seed(11), dtype=torch.float32)
    levels = [5 * s / (1 + 4 * s) for s in (1 - i / 4 for i in range(4))] + [0.0]
    for here, there in itertools.pairwise(levels):

        def velocity(text, at=here, x=latents):
            out = transformer(x.to(transformer.dtype), torch.tensor([1000 * at]), text.to(transformer.dtype))
            return out.sample.float()

        mixed = velocity(positive)
        if cfg > 1:
            unguided = velocity(negative)
            mixed = unguided + cfg * (mixed - unguided)
        latents = latents + (there - here) * mixed
    config = engine.vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    expected = latents * std + mean
    # Sigmas are float32 there and float64 here: a few roundings of float32, in bf16 too since latents stay float32.
    assert ((engine.sample(clip) - expected).norm() / expected.norm()).item() < 1e-5


def test_the_default_negative_prompt_is_the_released_one():
    """Character for character: the digest was taken from the released inference script."""
    assert hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest().startswith("ce96e0324e4b54ce")
