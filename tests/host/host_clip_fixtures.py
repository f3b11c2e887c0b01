"""`pytest_plugins = ["host_node_fixtures", "host_clip_fixtures"]` gives a module a small random Wan VAE and a clip."""

from __future__ import annotations

import pytest
import torch
from host_clips import FPS, TO_VIDEO, host_images, latents
from host_models import randomise
from host_nodes import run


@pytest.fixture(scope="module")
def one_thread():
    """Convolutions this small take several times as long on two threads that other programs also want."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inference_mode():
    """Nodes run in it."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vae(pack):
    """Loaded by the host from a Wan2.1 state dict of width 8."""
    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE

    model = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    randomise(model, 3)
    loaded = comfy.sd.VAE(sd=model.state_dict())
    assert loaded.vae_dtype == torch.float32 and loaded.latent_channels == 16
    return loaded


@pytest.fixture(scope="module")
def clip(vae):
    """Latents of 9 frames of 64 x 48 pixels, and the host's decode of them."""
    samples = latents(1, 16, 3, 6, 8)
    with torch.inference_mode():
        return samples, host_images(vae, samples)


@pytest.fixture
def video(nodes, vae, clip):
    """That clip as VIDEO, 8 bits."""
    return run(nodes[TO_VIDEO], samples=clip[0], vae=vae, fps=FPS, audio=None)[0]


@pytest.fixture
def hook(monkeypatch):
    """What the host's progress bar is told; calling `after(n)` presses Cancel at the n-th."""
    import comfy.model_management
    import comfy.utils

    class Hook:
        calls, stop = [], None

        def __call__(self, value, total, preview=None, node_id=None):
            self.calls.append((value, total, preview))
            if self.stop is not None and len(self.calls) >= self.stop:
                comfy.model_management.interrupt_current_processing()

        def after(self, number):
            self.stop = number

    made = Hook()
    made.calls = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", made)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_PERCENT", 0)
    yield made
    comfy.model_management.interrupt_current_processing(False)
