"""What a Wan VAE's encoder looks like, read from the shapes of its weights under the original key names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import T3Error
from .down_tiles import DownReach
from .structure import WAN, Block, Shape, Shapes, is_nested, read_levels, read_whole


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


def read_down_structure(shapes: Shapes) -> DownStructure:
    """The structure that these shapes, by original Wan VAE key names, describe.

    Raises T3Error when they are not those of a whole Wan VAE encoder.
    """
    return read_whole(shapes, "encoder", "hold no Wan VAE encoder", _read)


def _read(shapes: Shapes) -> DownStructure:
    stages = "encoder.downsamples"
    residual = is_nested(shapes, stages)

    def downsample(name: str, shape: Shape) -> Downsample:
        time = shapes.get(f"{name}.time_conv.weight")
        return Downsample(name, shape[0], shape[-1], time is not None, time[2] if time else 1)

    levels = tuple(DownLevel(*level) for level in read_levels(shapes, stages, downsample))
    first = shapes["encoder.conv1.weight"]
    patch = math.isqrt(first[1] // 3) if residual else 1
    if first[1] != 3 * patch * patch:
        raise T3Error(
            f"this {'Wan2.2' if residual else 'Wan2.1'} VAE's encoder takes {first[1]} channels; only RGB is encoded "
            f"here: 3 channels, or for Wan2.2 3 for each of 2 x 2 pixels. Use {WAN}."
        )
    return DownStructure(
        latent_channels=shapes["encoder.head.2.weight"][0] // 2,
        width=shapes["encoder.middle.0.residual.0.gamma"][0],
        levels=levels,
        first_radius=first[-1] // 2,
        patch=patch,
        residual=residual,
    )
