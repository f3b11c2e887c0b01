"""From ComfyUI's loaded VAE to our decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..t3.errors import T3Error
from ..t3.vae import WanDecoder, decode_frames
from ..t3.vae.choice import Choice, choices, weigh
from ..t3.vae.memory import kept_bytes, middle_bytes
from ..t3.vae.plan import Plan, make_plan
from ..t3.vae.structure import Structure, read_structure
from .families import FAMILIES
from .host_vae import Work, progress_of, read_vae


@dataclass
class Decode(Work):
    """One decode that is possible: latents `[B, C, T, H, W]` for this VAE."""

    structure: Structure
    latents: torch.Tensor
    name, coder, unused, good_enough = "decode", WanDecoder, "encoder.", 1.1

    @classmethod
    def of(cls, vae: Any, samples: dict[str, Any]) -> Decode:
        """Raises T3Error for another family's VAE, or latents that are not for this one."""
        structure = _decoder_of(vae)
        latents = samples["samples"]
        if getattr(latents, "is_nested", False):  # video and sound in one; the video comes first
            latents = latents.unbind()[0]
        shape = " x ".join(map(str, latents.shape))
        if latents.ndim != 5 or not all(latents.shape):
            raise T3Error(
                f"these latents have the shape {shape}; video latents are batch x channels x frames x height x width. "
                "Use latents of T3 Empty Latent or of a Wan model, not those of an image model."
            )
        if latents.shape[1] != structure.latent_channels:
            families = {family.channels: family.name for family in FAMILIES.values()}
            channels = latents.shape[1]
            whose = f" These are latents of {families[channels]}." if channels in families else ""
            raise T3Error(
                f"these latents have {channels} channels, and this {structure.generation} VAE decodes "
                f"{structure.latent_channels}.{whose} Load the VAE of the model that made them: the Wan2.1 VAE for 16 "
                "channels, the Wan2.2 VAE for 48."
            )
        return cls(vae, structure, latents)

    @property
    def size(self) -> tuple[int, int, int]:
        _, _, frames, height, width = self.latents.shape
        return frames, height, width

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`[B, frames, H, W, 3]` of what comes out."""
        frames, height, width = self.size
        scale = self.structure.scale
        return len(self.latents), self.structure.frames(frames), height * scale, width * scale, 3

    def into(self, out: torch.Tensor, tile: int = 0) -> str:
        """Decode into `out`, shaped as `shape`. tile: pixels, 0 for what fits the free memory.

        Returns how it went, in words. Raises T3Error for latents with NaN, a tile or a picture that does not fit, and
        what ComfyUI raises when the user cancels; then some of `out` is not decoded.
        """

        def work(decoder: WanDecoder, memory: int, size: tuple[int, int]) -> None:
            out[0, 0].zero_()
            progress = progress_of(out[0, 0])
            decode_frames(decoder, self.latents, memory=memory, tile=size, out=out, progress=progress, say=self.say)

        # What `out` will take is not taken before it is written to.
        _, how = self.run(tile, out.numel() * out.element_size(), work)
        return how

    def _choices(self, itemsize: int, tile: tuple[int, int] | None) -> Sequence[Choice]:
        _, height, width = self.size
        if tile:
            return [weigh(self.structure, height, width, tile, itemsize)]
        return choices(self.structure, height, width, itemsize)

    def _beside(self, itemsize: int) -> int:
        frames, height, width = self.size
        kept = kept_bytes(self.structure, frames, height, width, itemsize)
        return middle_bytes(self.structure, height, width, itemsize) + kept

    def _plan(self, device: torch.device, itemsize: int, memory: int, tile: int | None) -> Plan:
        return make_plan(self.structure, self.size, device, itemsize, memory, tile)


def _decoder_of(vae: Any) -> Structure:
    structure = read_vae(vae, read_structure, "decode with ComfyUI's VAE Decode")
    if structure.patch > 1 and structure.generation == "Wan2.1":
        raise T3Error(
            f"this Wan2.1 VAE gives {3 * structure.patch**2} channels, not 3: it is made for a node of its own. Use "
            "that node, or load the plain Wan2.1 VAE."
        )
    return structure
