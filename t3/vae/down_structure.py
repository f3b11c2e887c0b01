"""What a Wan VAE's encoder looks like, read from the shapes of its weights under the original key names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import T3Error
from .down_tiles import DownReach
from .structure import Block

_PLACE = re.compile(r"encoder\.downsamples\.(\d+)\.(?:downsamples\.(\d+)\.)?(?:residual|resample)\.")
_WAN = "a Wan2.1 VAE (wan_2.1_vae.safetensors) or a Wan2.2 VAE (wan2.2_vae.safetensors)"


@dataclass(frozen=True)
class Downsample:
    """Half the height and width, by a convolution of `kernel` x `kernel` and stride 2; with `temporal`, one frame out
    of two after that, by a convolution over `depth` frames and stride 2."""

    name: str
    channels: int
    kernel: int
    temporal: bool
    depth: int


@dataclass(frozen=True)
class DownLevel:
    """Residual blocks at one size, then a downsampling (not at the last level)."""

    blocks: tuple[Block, ...]
    downsample: Downsample | None


@dataclass(frozen=True)
class DownStructure:
    """The encoder of a Wan VAE.

    latent_channels: of the latents. width: channels of the middle stage. levels: from the picture to latents.
    first_radius, patch: radius of the first convolution; pixels per side that one of its inputs holds.
    residual: whether each level has Wan2.2's shortcut around it.
    """

    latent_channels: int
    width: int
    levels: tuple[DownLevel, ...]
    first_radius: int
    patch: int
    residual: bool

    @property
    def generation(self) -> str:
        return "Wan2.2" if self.residual else "Wan2.1"

    @property
    def scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch * 2 ** (len(self.levels) - 1)

    @property
    def step(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(level.downsample.temporal for level in self.levels if level.downsample)

    @property
    def picture_channels(self) -> int:
        """Channels that the first convolution takes."""
        return 3 * self.patch**2

    @property
    def reach(self) -> tuple[DownReach, ...]:
        """How far each level looks, for `t3.vae.down_tiles`."""
        return tuple(
            DownReach(
                tuple(2 * block.radius for block in level.blocks),
                level.downsample.kernel if level.downsample else None,
            )
            for level in self.levels
        )

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip: one for the first frame, and one for every `step` frames after it."""
        return 1 + (frames - 1) // self.step


def read_down_structure(shapes: Mapping[str, tuple[int, ...]]) -> DownStructure:
    """The structure that these shapes, by original Wan VAE key names, describe.

    Raises T3Error when they are not those of a whole Wan VAE encoder.
    """
    if "encoder.middle.0.residual.0.gamma" not in shapes:
        raise T3Error(
            f"these weights ({len(shapes)} tensors) hold no Wan VAE encoder: encoder.middle.0.residual.0.gamma is "
            f"missing. Use {_WAN}."
        )
    try:
        return _read(shapes)
    except KeyError as error:
        raise T3Error(
            f"these weights are no whole Wan VAE: {error.args[0]} is missing. Use {_WAN}, downloaded whole."
        ) from None


def _read(shapes: Mapping[str, tuple[int, ...]]) -> DownStructure:
    nested = "encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes
    places = sorted({(int(m[1]), int(m[2] or 0)) for key in shapes if (m := _PLACE.match(key))})
    levels: list[DownLevel] = []
    blocks: list[Block] = []
    for stage, index in places:
        name = f"encoder.downsamples.{stage}" + (f".downsamples.{index}" if nested else "")
        resample = shapes.get(f"{name}.resample.1.weight")
        if resample is None:
            weight = shapes[f"{name}.residual.2.weight"]
            blocks.append(Block(name, weight[1], weight[0], weight[-1] // 2))
        else:
            time = shapes.get(f"{name}.time_conv.weight")
            downsample = Downsample(name, resample[0], resample[-1], time is not None, time[2] if time else 1)
            levels.append(DownLevel(tuple(blocks), downsample))
            blocks = []
    levels.append(DownLevel(tuple(blocks), None))
    if not all(level.blocks for level in levels):
        raise KeyError("a residual block of encoder.downsamples")
    first = shapes["encoder.conv1.weight"]
    patch = math.isqrt(first[1] // 3) if nested else 1
    if first[1] != 3 * patch * patch:
        raise T3Error(
            f"this {'Wan2.2' if nested else 'Wan2.1'} VAE's encoder takes {first[1]} channels; only RGB is encoded "
            f"here: 3 channels, or for Wan2.2 3 for each of 2 x 2 pixels. Use {_WAN}."
        )
    return DownStructure(
        latent_channels=shapes["encoder.head.2.weight"][0] // 2,
        width=shapes["encoder.middle.0.residual.0.gamma"][0],
        levels=tuple(levels),
        first_radius=first[-1] // 2,
        patch=patch,
        residual=nested,
    )
