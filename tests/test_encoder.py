"""What image-to-video pipelines get in place of diffusers' own encode."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from vae_fixtures import NAMES, SCALE, config

from t3.encoder import Encoder

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_gets_the_latents_of_diffusers(name):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config(name)).eval()
    told = []
    Encoder(vae, CPU, say=told.append).for_pipeline()
    video = torch.rand(1, 3, 5, 3 * SCALE[name], 4 * SCALE[name]) * 2 - 1
    video[:, :, 1:] = 0  # as the pipelines make it of one image: not a clip that is mostly below black
    with torch.no_grad():
        wanted = AutoencoderKLWan.encode(vae, video).latent_dist.mode()
    found = vae.encode(video).latent_dist.mode()
    assert found.shape == wanted.shape and found.dtype == video.dtype and not told
    # float32 sums of two implementations, relative to the largest latent.
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert torch.equal(vae.encode(video, return_dict=False)[0].mode(), found)


def test_frames_in_16_bits_are_not_rounded_once_more():
    """(x + 1) / 2 in bfloat16 would lose a bit."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config(NAMES[0])).to(torch.bfloat16).eval()
    seen = []
    encoder = Encoder(vae, CPU)
    encoder.for_pipeline()
    plain = type(encoder).__call__
    video = (torch.rand(1, 3, 1, 16, 16) * 2 - 1).bfloat16()
    try:
        type(encoder).__call__ = lambda self, frames: seen.append(frames) or plain(self, frames)
        found = vae.encode(video).latent_dist.mode()
    finally:
        type(encoder).__call__ = plain
    assert found.dtype == torch.bfloat16
    assert torch.equal((seen[0] * 2 - 1).movedim(-1, 1).bfloat16(), video)
