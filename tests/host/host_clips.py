"""What tests ask of images, videos and sound; the fixtures are in `host_clip_fixtures`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

DECODE, TO_VIDEO = "T3VAEDecode", "T3VAEDecodeToVideo"
FPS = 8
CLOSE = 5e-6  # some roundings of float32; the decoders' own tests are finer
MARKS = pytest.mark.usefixtures("folders", "one_thread", "inference_mode")
BUFFER = "comfyui_t3_pack.nodes.frame_buffer"


def latents(*shape, seed=0):
    return {"samples": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def host_images(vae, samples):
    import nodes as host_nodes

    return host_nodes.VAEDecode().decode(vae, samples)[0]


def tone(seconds, rate=48000, channels=2):
    """A rising tone, so that every place of it is another."""
    time = torch.arange(round(seconds * rate)) / rate
    wave = 0.5 * torch.sin(2 * math.pi * (200 + 300 * time) * time)
    return {"waveform": wave.repeat(1, channels, 1), "sample_rate": rate}


def free_memory_of(monkeypatch, size):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: size)


def frames_of(video):
    """The 8- or 16-bit numbers in a video's buffer."""
    return video._frames


def pictures(path):
    """Decoded frames of a file as RGB float arrays, and its first video stream."""
    import av

    with av.open(str(path) if isinstance(path, Path) else path) as container:
        stream = container.streams.video[0]
        found = [frame.to_ndarray(format="gbrpf32le") for frame in container.decode(stream)]
        return np.stack(found), stream


class Untouchable:
    """A VAE's model that may be looked at once, and not be made a decoder of."""

    def __init__(self, model):
        self._model, self._looks = model, 0

    def state_dict(self):
        self._looks += 1
        assert self._looks == 1, "work began"
        return self._model.state_dict()
