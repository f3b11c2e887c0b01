"""What a Wan VAE's decoder looks like, read from the shapes of its weights under the original key names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import T3Error
from .tiles import Reach

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
WAN = "a Wan2.1 VAE (wan_2.1_vae.safetensors) or a Wan2.2 VAE (wan2.2_vae.safetensors)"


@dataclass(frozen=True)
class Block:
    """One residual block: channels in and out, radius of each of its two convolutions."""

    name: str
    into: int
    out: int
    radius: int


@dataclass(frozen=True)
class Upsample:
    """Twice the height and width, then a convolution; with `temporal`, two frames out of one before that."""

    name: str
    into: int
    out: int
    radius: int
    temporal: bool


@dataclass(frozen=True)
class Level:
    """Residual blocks at one size, then an upsampling (not at the last level)."""

    blocks: tuple[Block, ...]
    upsample: Upsample | None


@dataclass(frozen=True)
class Structure:
    """The decoder of a Wan VAE.

    latent_channels: of the latents. width: channels of the middle stage. levels: from latents to pixels.
    head_radius, patch: radius of the last convolution; pixels per side that one of its results holds.
    residual: whether each level has Wan2.2's shortcut around it.
    """

    latent_channels: int
    width: int
    levels: tuple[Level, ...]
    head_radius: int
    patch: int
    residual: bool

    @property
    def generation(self) -> str:
        return "Wan2.2" if self.residual else "Wan2.1"

    @property
    def upscale(self) -> int:
        """Height and width of the last level over those of the latents."""
        return 2 ** (len(self.levels) - 1)

    @property
    def scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.upscale * self.patch

    @property
    def reach(self) -> tuple[Reach, ...]:
        """How far each level looks, for `t3.vae.tiles`."""
        return tuple(
            Reach(tuple(2 * b.radius for b in level.blocks), level.upsample.radius if level.upsample else None)
            for level in self.levels
        )

    def frames(self, latent_frames: int) -> int:
        """Frames of a clip: one for the first latent frame, and as many as time is upsampled by for every other."""
        factor = 2 ** sum(level.upsample.temporal for level in self.levels if level.upsample)
        return 1 + (latent_frames - 1) * factor


def read_structure(shapes: Shapes) -> Structure:
    """The structure that these shapes, by original Wan VAE key names, describe.

    Raises T3Error when they are not those of a whole Wan VAE decoder.
    """
    return read_whole(shapes, "decoder", "are no Wan VAE", _read)


def read_whole(shapes: Shapes, part: str, otherwise: str, read: Callable[[Shapes], Any]) -> Any:
    """`read(shapes)`, with sentences for what is missing.

    part: "decoder" or "encoder". otherwise: what is said of weights that have no such part at all.
    """
    first = f"{part}.middle.0.residual.0.gamma"
    if first not in shapes:
        raise T3Error(f"these weights ({len(shapes)} tensors) {otherwise}: {first} is missing. Use {WAN}.")
    try:
        return read(shapes)
    except KeyError as error:
        raise T3Error(
            f"these weights are no whole Wan VAE: {error.args[0]} is missing. Use {WAN}, downloaded whole."
        ) from None


def read_levels(
    shapes: Shapes, stages: str, resample: Callable[[str, Shape], Any]
) -> list[tuple[tuple[Block, ...], Any]]:
    """For each level its residual blocks and what `resample(name, shape of its convolution)` makes of the resampling
    after them, None at the last level. stages: such as "decoder.upsamples"; in Wan2.2 they are stages of stages."""
    own = stages.split(".")[1]
    place = re.compile(rf"{re.escape(stages)}\.(\d+)\.(?:{own}\.(\d+)\.)?(?:residual|resample)\.")
    nested = is_nested(shapes, stages)
    places = sorted({(int(m[1]), int(m[2] or 0)) for key in shapes if (m := place.match(key))})
    levels: list[tuple[tuple[Block, ...], Any]] = []
    blocks: list[Block] = []
    for stage, index in places:
        name = f"{stages}.{stage}" + (f".{own}.{index}" if nested else "")
        convolution = shapes.get(f"{name}.resample.1.weight")
        if convolution is None:
            weight = shapes[f"{name}.residual.2.weight"]
            blocks.append(Block(name, weight[1], weight[0], weight[-1] // 2))
        else:
            levels.append((tuple(blocks), resample(name, convolution)))
            blocks = []
    levels.append((tuple(blocks), None))
    if not all(blocks for blocks, _ in levels):
        raise KeyError(f"a residual block of {stages}")
    return levels


def is_nested(shapes: Shapes, stages: str) -> bool:
    """Whether this is Wan2.2's way to name them."""
    return f"{stages}.0.{stages.split('.')[1]}.0.residual.2.weight" in shapes


def _read(shapes: Shapes) -> Structure:
    stages = "decoder.upsamples"

    def upsample(name: str, shape: Shape) -> Upsample:
        return Upsample(name, shape[1], shape[0], shape[-1] // 2, f"{name}.time_conv.weight" in shapes)

    levels = tuple(Level(*level) for level in read_levels(shapes, stages, upsample))
    head = shapes["decoder.head.2.weight"]
    patch = math.isqrt(head[0] // 3)
    if head[0] != 3 * patch * patch:
        raise T3Error(
            f"this VAE's decoder gives {head[0]} channels; only RGB is decoded here: 3 channels, or 3 for each of "
            f"2 x 2 pixels. Use {WAN}."
        )
    return Structure(
        latent_channels=shapes["conv2.weight"][0],
        width=shapes["decoder.conv1.weight"][0],
        levels=levels,
        head_radius=head[-1] // 2,
        patch=patch,
        residual=is_nested(shapes, stages),
    )
