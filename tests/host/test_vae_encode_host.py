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
    """What `VAE.encode` makes of images, without what surrounds it: to [-1, 1], channels first."""
    with torch.no_grad():
        return model.encode((frames * 2 - 1).movedim(-1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [((1, 5, 3), None), ((5, 3, 5), (2, 2)), ((9, 2, 3), (1, 2)), ((17, 1, 1), None), ((13, 2, 21), (2, 5))],
)
def test_float64_is_the_hosts_float64(pack, kind, shape, tile):
    model = host_vae(kind, torch.float64)
    encoder = WanEncoder.from_state_dict(model.state_dict())
    scale = encoder.structure.scale
    frames = frames_for(encoder, *shape, batch=2 if shape[0] == 5 else 1).double()
    found = encode_frames(encoder, frames, tile=tile and (tile[0] * scale, tile[1] * scale))
    wanted = host_latents(model, frames)
    assert wanted.dtype == torch.float64 and wanted.std() > 0.1
    assert off(found, wanted) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_near_to_float64_as_the_host(pack, kind):
    model = host_vae(kind, torch.float32)
    encoder = WanEncoder.from_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    frames = frames_for(encoder, 9, 4, 5)
    theirs = host_latents(model, frames)
    exact = host_latents(model.double(), frames.double())
    for tile in (None, 2 * encoder.structure.scale):
        assert off(encode_frames(encoder, frames, tile=tile), exact) <= 2 * off(theirs, exact) + 1e-7


@pytest.mark.parametrize("count", [1, 5])
def test_a_loaded_vae_hands_its_weights_over(pack, count):
    """Through ComfyUI's own loader and `VAE.encode`: the space of its latents.

    Wan2.1 only: the loader builds it at the width of the weights, but Wan2.2 at the released width, 2.8 GB.
    """
    import comfy.sd

    model = host_vae("Wan2.1", torch.float32)
    vae = comfy.sd.VAE(sd=model.state_dict(), dtype=torch.float32, device=torch.device("cpu"))
    vae.throw_exception_if_invalid()
    encoder = WanEncoder.from_state_dict(vae.first_stage_model.state_dict(), vae.device, vae.vae_dtype)
    frames = frames_for(encoder, count, 4, 3)
    wanted = vae.encode(frames[0]).detach()
    found = encode_frames(encoder, frames, tile=16)
    assert found.shape == wanted.shape == (1, 16, 1 + count // 4, 4, 3)
    assert found.dtype == wanted.dtype == torch.float32
    assert off(found, wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_hosts_tiles_are_not_exact(pack, kind):
    """What the same test says of tiles that overlap by a quarter and are blended, as `VAEEncodeTiled` makes them."""
    import comfy.utils

    model = host_vae(kind, torch.float64)
    encoder = WanEncoder.from_state_dict(model.state_dict())
    scale = encoder.structure.scale
    frames = frames_for(encoder, 5, 4, 20).double()
    exact = host_latents(model, frames)
    with torch.no_grad():
        tiled = comfy.utils.tiled_scale_multidim(
            (frames * 2 - 1).movedim(-1, 1),
            model.encode,
            (5, 8 * scale, 8 * scale),
            overlap=(1, 2 * scale, 2 * scale),
            out_channels=model.z_dim,
            upscale_amount=(lambda frames: (frames + 3) // 4, scale, scale),
            index_formulas=(4, scale, scale),
            downscale=True,
        )
    assert off(tiled, exact) > 1e-2
    assert off(encode_frames(encoder, frames, tile=8 * scale), exact) < 1e-12
