"""Our VAE decoder against ComfyUI's own classes, and on what ComfyUI's loaded VAE hands over."""

from __future__ import annotations

import math

import pytest
import torch
from vae_fixtures import as_frames, off
from vae_fixtures import one_thread as one_thread

from t3.vae import WanDecoder, decode_frames

DEPTH = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}
KINDS = ("Wan2.1", "Wan2.2")


def host_vae(kind, dtype, seed=0, **sizes):
    """The host's model with narrow random weights. In float64 nothing in it is rounded to less."""
    from comfy.ldm.wan import vae, vae2_2

    if kind == "Wan2.1":
        model = vae.WanVAE(**DEPTH, **{"dim": 8, "z_dim": 16, **sizes})
    else:
        model = vae2_2.WanVAE(**DEPTH, **{"dim": 4, "dec_dim": 8, "z_dim": 48, **sizes})
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if key.endswith("gamma"):
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.3 if noise.ndim == 1 else 1 / math.sqrt(math.prod(noise.shape[1:]))
        parameter.data = noise.to(dtype)
    return model.eval().requires_grad_(False)


def latents_for(model, *shape, batch=1, seed=1):
    return torch.randn(batch, model.z_dim, *shape, generator=torch.Generator().manual_seed(seed))


def host_frames(model, latents):
    with torch.no_grad():
        return as_frames(model.decode(latents))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [((1, 5, 3), None), ((2, 3, 5), (2, 2)), ((4, 2, 3), (1, 2)), ((5, 1, 1), None), ((3, 2, 29), (2, 5))],
)
def test_float64_is_the_hosts_float64(pack, kind, shape, tile):
    model = host_vae(kind, torch.float64)
    decoder = WanDecoder.from_state_dict(model.state_dict())
    scale = decoder.structure.scale
    latents = latents_for(model, *shape, batch=2 if shape[0] < 3 else 1).double()
    found = decode_frames(decoder, latents, tile=tile and (tile[0] * scale, tile[1] * scale))
    assert off(found, host_frames(model, latents)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_near_to_float64_as_the_host(pack, kind):
    model = host_vae(kind, torch.float32)
    latents = latents_for(model, 3, 4, 5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = host_frames(model, latents)
    exact = host_frames(model.double(), latents.double())
    decoder = WanDecoder.from_state_dict(state)
    for tile in (None, 2 * decoder.structure.scale):
        assert off(decode_frames(decoder, latents, tile=tile), exact) <= 2 * off(theirs, exact) + 1e-7


def test_a_loaded_vae_hands_its_weights_over(pack):
    """Through ComfyUI's own loader, `VAE.decode` and its conversion to images.

    Wan2.1 only: the loader builds it at the width of the weights, but Wan2.2 at the released width, 2.8 GB.
    """
    import comfy.sd

    model = host_vae("Wan2.1", torch.float32)
    vae = comfy.sd.VAE(sd=model.state_dict(), dtype=torch.float32, device=torch.device("cpu"))
    vae.throw_exception_if_invalid()
    latents = latents_for(model, 2, 4, 3)
    with torch.no_grad():
        wanted = vae.decode(latents)
    decoder = WanDecoder.from_state_dict(vae.first_stage_model.state_dict(), vae.device, vae.vae_dtype)
    found = decode_frames(decoder, latents, tile=16)
    assert found.shape == wanted.shape == (1, 5, 32, 24, 3)
    assert off(found, wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_hosts_tiles_are_not_exact(pack, kind):
    """What the same test says of tiles that overlap by a quarter and are blended, as `VAEDecodeTiled` makes them."""
    import comfy.utils

    model = host_vae(kind, torch.float64)
    decoder = WanDecoder.from_state_dict(model.state_dict())
    latents = latents_for(model, 2, 4, 20).double()
    exact = host_frames(model, latents)

    with torch.no_grad():
        tiled = comfy.utils.tiled_scale_multidim(
            latents,
            lambda piece: model.decode(piece),
            (2, 8, 8),
            overlap=(1, 2, 2),
            out_channels=3,
            upscale_amount=(lambda t: max(0, t * 4 - 3), decoder.structure.scale, decoder.structure.scale),
            index_formulas=(4, decoder.structure.scale, decoder.structure.scale),
        )
    assert off(as_frames(tiled), exact) > 1e-2
    assert off(decode_frames(decoder, latents, tile=8 * decoder.structure.scale), exact) < 1e-12
