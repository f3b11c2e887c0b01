"""Our VAE encoder against ComfyUI's own classes, and on what ComfyUI's loaded VAE hands over."""

from __future__ import annotations

import pytest
import torch
from test_vae_host import KINDS, host_vae
from vae_fixtures import off

from t3.vae import WanEncoder, encode_frames

# ComfyUI builds its models with these; DEPTH in `test_vae_host` names the decoder's order of time.
TIME = {"temperal_downsample": [True, True, False]}


def frames_for(encoder, *shape, batch=1, seed=1):
    """`[batch, frames, H, W, 3]` for a shape in frames and latents."""
    size = shape[1] * encoder.structure.scale, shape[2] * encoder.structure.scale
    return torch.rand(batch, shape[0], *size, 3, generator=torch.Generator().manual_seed(seed))


def host_latents(model, frames):
    with torch.no_grad():
        return model.encode((frames * 2 - 1).movedim(-1, 1))
