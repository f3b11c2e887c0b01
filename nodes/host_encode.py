"""From ComfyUI's loaded VAE to our encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..t3.errors import T3Error
from ..t3.vae import WanEncoder, encode_frames
from ..t3.vae.choice import Choice
from ..t3.vae.down_memory import down_middle_bytes, features_bytes
from ..t3.vae.down_plan import down_choices, down_weigh, make_down_plan
from ..t3.vae.down_structure import DownStructure, read_down_structure
from ..t3.vae.plan import Plan
from .host_vae import Work, progress_of, read_vae


@dataclass
class Encode(Work):
    """One encode that is possible: frames `[B, frames, H, W, 3]` of a size that this VAE encodes."""

    structure: DownStructure
    frames: torch.Tensor
    # An encode takes less time than a decode, and its tiles more memory: 4 GB for these at 4K, and 9 GB for 1.1.
    name, coder, unused, good_enough = "encode", WanEncoder, "decoder.", 1.2

    @classmethod
    def of(cls, vae: Any, images: torch.Tensor) -> Encode:
        """Images as ComfyUI has them, `[frames, H, W, 3]`: one clip. (`[B, frames, H, W, 3]`: several.)

        What does not fit the VAE is left out as ComfyUI's own encode does it, and told: pixels about the edges, frames
        at the end. Raises T3Error for another family's VAE, or images that it cannot encode.
        """
        structure = read_vae(vae, read_down_structure, "encode with ComfyUI's VAE Encode")
        shape = " x ".join(map(str, images.shape))
        if images.ndim not in (4, 5) or not all(images.shape):
            raise T3Error(f"these images have the shape {shape}; images are frames x height x width x 3.")
        if images.shape[-1] != 3:
            alpha = " Take the transparency off with Split Image with Alpha." if images.shape[-1] == 4 else ""
            raise T3Error(
                f"these images have {images.shape[-1]} channels; a Wan VAE encodes 3, red, green, blue.{alpha}"
            )
        frames = images if images.ndim == 5 else images[None]
        _, count, height, width, _ = frames.shape
        scale, step = structure.scale, structure.step
        rows, cols, kept = height // scale * scale, width // scale * scale, 1 + (count - 1) // step * step
        if not rows or not cols:
            raise T3Error(
                f"these images are {width} x {height} pixels; the least that a {structure.generation} VAE encodes is "
                f"{scale} x {scale}. Use larger ones."
            )
        top, left = (height - rows) // 2, (width - cols) // 2
        encode = cls(vae, structure, frames[:, :kept, top : top + rows, left : left + cols])
        if (rows, cols) != (height, width):
            encode.say(
                f"encode: the images are cropped about the middle from {width} x {height} to {cols} x {rows} pixels, "
                f"since a {structure.generation} VAE encodes multiples of {scale}."
            )
        if kept != count:
            last = f"last {count - kept} of {count} frames are" if count - kept > 1 else f"last of {count} frames is"
            encode.say(f"encode: the {last} left out, since Wan VAEs encode 1, {1 + step}, {1 + 2 * step}, ... frames.")
        return encode

    @property
    def size(self) -> tuple[int, int, int]:
        _, count, height, width, _ = self.frames.shape
        return self.structure.latent_frames(count), height // self.structure.scale, width // self.structure.scale

    def latents(self, tile: int = 0) -> tuple[torch.Tensor, str]:
        """The latents `[B, C, T, H, W]`, where and as ComfyUI's own encode leaves them, and how it went, in words.

        tile: pixels, 0 for what fits the free memory. Raises T3Error for images with NaN, a tile or a picture that does
        not fit, and what ComfyUI raises when the user cancels.
        """

        def work(encoder: WanEncoder, memory: int, size: tuple[int, int]) -> torch.Tensor:
            progress = progress_of()
            return encode_frames(encoder, self.frames, memory=memory, tile=size, progress=progress, say=self.say)

        numbers = len(self.frames) * self.structure.latent_channels * math.prod(self.size)
        found, how = self.run(tile, numbers * torch.float32.itemsize, work)
        return found.to(self.vae.output_device, self.vae.vae_output_dtype()), how

    def _choices(self, itemsize: int, tile: tuple[int, int] | None) -> Sequence[Choice]:
        _, height, width = self.size
        if tile:
            return [down_weigh(self.structure, height, width, tile, itemsize)]
        return down_choices(self.structure, height, width, itemsize)

    def _beside(self, itemsize: int) -> int:
        frames, height, width = self.size
        kept = features_bytes(self.structure, frames, height, width, itemsize)
        return down_middle_bytes(self.structure, height, width, itemsize) + kept

    def _plan(self, device: torch.device, itemsize: int, memory: int, tile: int | None) -> Plan:
        return make_down_plan(self.structure, self.size, device, itemsize, memory, tile)
