"""Our VAE encoder against ComfyUI's own classes, and on what ComfyUI's loaded VAE hands over."""

from __future__ import annotations

import pytest
import torch
from test_vae_host import KINDS, host_vae
from vae_fixtures import off
from vae_fixtures import one_thread as one_thread

from t3.vae import WanEncoder, encode_frames


def frames_for(encoder, *shape, batch=1, seed=1):
    """`[batch, frames, H, W, 3]` for a shape in frames and latents."""
    size = shape[1] * encoder.structure.scale, shape[2] * encoder.structure.scale
    return torch.rand(batch, shape[0], *size, 3, generator=torch.Generator().manual_seed(seed))


def host_latents(model, frames):
    with torch.no_grad():
        return model.encode((frames * 2 - 1).movedim(-1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "tile"), [((1, 5, 3), None), ((5, 3, 5), (2, 2)), ((9, 2, 3), (1, 2)), ((5, 2, 21), (2, 5))]
)
def test_float64_is_the_hosts_float64(pack, kind, shape, tile):
    model = host_vae(kind, torch.float64)
    encoder = WanEncoder.from_state_dict(model.state_dict())
    scale = encoder.structure.scale
    frames = frames_for(encoder, *shape, batch=2 if shape[0] == 1 else 1).double()
    found = encode_frames(encoder, frames, tile=tile and (tile[0] * scale, tile[1] * scale))
    assert off(found, host_latents(model, frames)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_near_to_float64_as_the_host(pack, kind):
    model = host_vae(kind, torch.float32)
    encoder = WanEncoder.from_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    frames = frames_for(encoder, 5, 4, 5)
    theirs = host_latents(model, frames)
    exact = host_latents(model.double(), frames.double())
    for tile in (None, 2 * encoder.structure.scale):
        assert off(encode_frames(encoder, frames, tile=tile), exact) <= 2 * off(theirs, exact) + 1e-7


def test_a_loaded_vae_hands_its_weights_over(pack):
    """Through ComfyUI's own loader and `VAE.encode`; Wan2.1 only, as for the decoder."""
    import comfy.sd

    model = host_vae("Wan2.1", torch.float32)
    vae = comfy.sd.VAE(sd=model.state_dict(), dtype=torch.float32, device=torch.device("cpu"))
    vae.throw_exception_if_invalid()
    encoder = WanEncoder.from_state_dict(vae.first_stage_model.state_dict(), vae.device, vae.vae_dtype)
    frames = frames_for(encoder, 5, 4, 3)
    with torch.no_grad():
        wanted = vae.encode(frames[0])
    found = encode_frames(encoder, frames, tile=16)
    assert found.shape == wanted.shape == (1, 16, 2, 4, 3)
    assert off(found, wanted) < 1e-5
