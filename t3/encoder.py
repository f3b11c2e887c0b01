"""Frames to latents with a loaded Wan VAE: in exact tiles that fit the memory (`t3.vae`), by one process or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import AutoencoderKLWan

from .vae import WanEncoder, encode_frames

if TYPE_CHECKING:
    from .vae.ranks import Ranks

Say = Callable[[str], object]


class Mean(NamedTuple):
    """A posterior of which only the mean is known: what pipelines take of an image's latents."""

    mean: torch.Tensor

    def mode(self) -> torch.Tensor:
        """Where the posterior is densest."""
        return self.mean


class Encoded(NamedTuple):
    """What `AutoencoderKLWan.encode` returns, as far as pipelines look at it."""

    latent_dist: Mean


class Encoder:
    """Encodes clips with the VAE's weights, which are on the device only meanwhile.

    vae: on any device. ranks: processes that share every encode; all of them must make the same ones. say: told what
    an encode resorts to.
    """

    def __init__(
        self, vae: AutoencoderKLWan, device: torch.device, ranks: Ranks | None = None, say: Say | None = None
    ) -> None:
        self.vae, self.device, self.ranks, self.say = vae, device, ranks, say

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """`[B, frames, H, W, 3]` to latents `[B, C, T, h, w]` in the VAE's space: as `t3.vae.encode_frames`."""
        encoder = WanEncoder.from_state_dict(self.vae.state_dict(), self.device, self.vae.dtype)
        if self.ranks is None or self.ranks.size == 1:
            return encode_frames(encoder, frames, say=self.say)
        from .vae.shared_encode import encode_shared

        return encode_shared(encoder, frames, self.ranks, say=self.say)

    def for_pipeline(self) -> None:
        """Let diffusers' image-to-video pipelines encode by this: `vae.encode` holds a whole picture at a time, which
        is more than a card at 4K."""

        def encode(x: torch.Tensor, return_dict: bool = True) -> Encoded | tuple[Mean]:
            # float32 before the range is moved: in 16 bits that would round.
            found = self((x.movedim(1, -1).float() + 1).div_(2))
            posterior = Mean(found.to(x.device, x.dtype))
            return Encoded(posterior) if return_dict else (posterior,)

        self.vae.encode = encode
