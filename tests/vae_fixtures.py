"""Small random Wan VAEs under their original key names, and what a test needs to look at a decode."""

from __future__ import annotations

import gc
import math
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from t3.vae import WanDecoder
from t3.weights import known_config
from t3.weights.layout_vae import vae_layout

NAMES = ("wan2.1-vae", "wan2.2-vae")
SCALE = {"wan2.1-vae": 8, "wan2.2-vae": 16}


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small, threads that wait for each other take up to six times as long as one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(name: str, **changes) -> dict:
    """diffusers' config of a narrow VAE with the released depth and channels of latents."""
    found = {key: value for key, value in known_config(name).items() if not key.startswith("_")}
    return {**found, "base_dim": 4, "decoder_base_dim": 8 if name == "wan2.2-vae" else None, **changes}


def random_state(name: str, seed: int = 0, dtype=torch.float64, **changes) -> dict[str, torch.Tensor]:
    """Weights that keep the scale of what passes through, and bring in every gamma and bias."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, param in vae_layout(config(name, **changes)).items():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if key.endswith("gamma"):
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.3 if noise.ndim == 1 else 1 / math.sqrt(math.prod(noise.shape[1:]))
        state[key] = noise.to(dtype)
    return state


def small_decoder(name: str, dtype=torch.float64, seed: int = 0) -> WanDecoder:
    return WanDecoder.from_state_dict(random_state(name, seed), dtype=dtype)


def random_latents(name: str, *shape: int, batch: int = 1, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    """`[batch, C, *shape]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, known_config(name)["z_dim"], *shape, generator=generator, dtype=torch.float64).to(dtype)


def as_frames(video: torch.Tensor) -> torch.Tensor:
    """`[B, 3, frames, H, W]` in [-1, 1] and beyond to what `decode_frames` returns."""
    return ((video + 1) / 2).clamp(0, 1).movedim(1, -1)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def out_of_memory() -> Exception:
    """What torch raises on a card."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def fail_once_in_middle(monkeypatch, kind: type) -> list[int]:
    """Let memory run out in the second call of a coder's middle stage. Gives the bytes for scores of every call."""
    scores, plain = [], kind.middle

    def middle(self, x, past, memory):
        scores.append(memory)
        if len(scores) == 2:
            raise out_of_memory()
        return plain(self, x, past, memory)

    monkeypatch.setattr(kind, "middle", middle)
    return scores


class Peak:
    """Main memory that torch takes inside, in bytes: `most` at one time, and what of it is `left` at the end."""

    def __enter__(self) -> Peak:
        gc.collect()  # what earlier tests left behind would be given back inside, and counted
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        taken = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
        self.most, self.left = max(taken), taken[-1]
