"""diffusers' Wan transformer with random weights of the real sizes, run whole or in part."""

from __future__ import annotations

from typing import Any

import torch

from ..cost import ModelShape
from ..errors import T3Error
from ..memory import GIB
from ..plan import Grid, Plan
from ..weights.catalogue import known_config
from .timing import release, timed

MODELS = {"1.3b": "wan2.1-t2v-1.3b", "5b": "wan2.2-ti2v-5b", "14b": "wan2.1-t2v-14b"}
PIXELS = {"1.3b": 16, "5b": 32, "14b": 16}  # of a token's side
SIZES = {
    "480p": (480, 832),
    "720p": (720, 1280),
    "1080p": (1088, 1920),
    "1440p": (1440, 2560),
    "4k": (2176, 3840),
    "8k": (4320, 7680),
}
TINY_SIZES = {
    "480p": (64, 64),
    "720p": (64, 96),
    "1080p": (96, 96),
    "1440p": (96, 128),
    "4k": (96, 160),
    "8k": (128, 192),
}
TINY = {"num_layers": 5, "num_attention_heads": 2, "ffn_dim": 256, "text_dim": 64}


def size_of(name: str, tiny: bool = False) -> tuple[int, int]:
    """Height and width in pixels; of a model with tokens of 32 pixels, the nearest that it takes."""
    sizes = TINY_SIZES if tiny else SIZES
    if name not in sizes:
        raise T3Error(f"--sizes {name!r} is not known; known are {', '.join(sizes)}.")
    return sizes[name]


def grid_of(model: str, size: tuple[int, int], frames: int) -> Grid:
    """The token grid of a clip, its sides rounded to what the model takes."""
    side = PIXELS[model]
    height, width = (max(1, round(pixels / side)) * side for pixels in size)
    return Grid.from_video(frames, height, width, side)


def diffusers_refusal() -> str | None:
    """Why diffusers' transformer cannot be had here, or None."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        return f"diffusers cannot be imported ({error})"
    return None


class Transformer:
    """A transformer on a device, bfloat16 on a card; `layers`: of the model's own, if not all are to be built."""

    def __init__(self, name: str, device: torch.device, *, layers: int | None = None, tiny: bool = False) -> None:
        from diffusers import WanTransformer3DModel

        config = {key: value for key, value in known_config(MODELS[name]).items() if not key.startswith("_")}
        config |= TINY if tiny else {}
        self.name, self.device = name, device
        self.shape = ModelShape.from_config(config)
        self.plan = Plan.for_latent_channels(config["in_channels"])
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with torch.device(device):
            model = WanTransformer3DModel(**config | {"num_layers": layers or config["num_layers"]})
        for key, parameter in model.named_parameters():
            # Loading a model keeps these in float32, too.
            if not any(part in key.split(".") for part in model._keep_in_fp32_modules):
                parameter.data = parameter.data.to(self.dtype)
        self.model = model.eval().requires_grad_(False)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def forward(self, grid: Grid) -> torch.Tensor:
        """One forward pass of random latents, batch 1, with text of full length."""
        frames, height, width = (n * p for n, p in zip(grid, self.shape.patch, strict=True))
        generator = torch.Generator(self.device).manual_seed(1)
        options = {"generator": generator, "device": self.device, "dtype": self.dtype}
        latents = torch.randn(1, self.shape.in_channels, frames, height, width, **options)  # type: ignore[call-overload]
        text = torch.randn(1, self.shape.text_tokens, self.shape.text_dim, **options)  # type: ignore[call-overload]
        timestep = torch.tensor([500.0], device=self.device)
        return self.model(latents, timestep, text, return_dict=False)[0]

    def measure(self, grid: Grid, *, warm: bool = True) -> dict[str, float]:
        """Seconds of a forward pass, and its peak: with weights, and beside them. warm: one goes before."""
        if warm:
            self.forward(grid)
        release(self.device)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        out, ms = timed(lambda: self.forward(grid), self.device)
        if not torch.isfinite(out).all():
            raise T3Error("the forward pass gave values that are not numbers.")
        found = {"seconds": ms / 1e3}
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
            found |= {"peak_gib": peak / GIB, "activations_gib": (peak - before) / GIB}
        return found

    def measure_part(self, grid: Grid, layers: int, *, warm: bool = True) -> dict[str, float]:
        """The same from only so many of the layers, scaled to all: what is outside the layers is measured apart."""
        blocks = self.model.blocks
        try:
            self.model.blocks = blocks[:0]
            outside = self.measure(grid)["seconds"]
            self.model.blocks = blocks[:layers]
            found = self.measure(grid, warm=warm)
        finally:
            self.model.blocks = blocks
        # Of layers that take next to nothing, noise is the larger part.
        seconds = outside + max(0.0, found["seconds"] - outside) * self.shape.layers / layers
        return found | {"seconds": seconds}

    def remove(self) -> Any:
        """Let go of the weights."""
        del self.model
        release(self.device)
