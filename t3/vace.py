"""What a VACE model is given beside the prompt: a video, and a mask of what of it is to be made, as latents.

diffusers' pipeline makes them of pixels in float32 and encodes them untiled, tens of gigabytes at 4K; here they are
encoded in exact tiles. Layout of the published code: the latents of what is kept, those of what is made over, the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanVACEPipeline

from .encoder import Encoder
from .images import load_image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .jobs import Clip

# Where there is no picture stands the middle of the range, as VACE was trained: 0 in [-1, 1], here to 1.5e-5.
_GREY = 32768


class VacePipeline(WanVACEPipeline):
    """diffusers' pipeline, which is handed finished latents and a finished mask as `video` and `mask`."""

    def preprocess_conditions(self, video, mask, *_, **__) -> tuple[torch.Tensor, torch.Tensor, list[list]]:
        """Both as they are, and no reference images."""
        return video, mask, [[]]

    def prepare_video_latents(self, video, *_, **__) -> torch.Tensor:
        """Prepared before."""
        return video

    def prepare_masks(self, mask, *_, **__) -> torch.Tensor:
        """Prepared before."""
        return mask


class Control:
    """Makes what a clip's model is given. That of the last clip is kept: prompts of one size and image share it."""

    def __init__(self, encode: Encoder) -> None:
        """encode: what clips are encoded with; the result is on its device."""
        self.encode, self.vae, self.device = encode, encode.vae, encode.device
        self._last: tuple[Any, dict[str, torch.Tensor]] = (None, {})

    def of(self, clip: Clip) -> dict[str, torch.Tensor]:
        """`video` `[1, 2 * C, T, h, w]` and `mask` `[1, 64, T, h, w]` for `VacePipeline`, in float32 on the device.

        Without an image everything is to be made. With one the clip's first frame is kept, and its last where it has an
        image for it. A latent frame's mask is that of the frame in its middle, as published: the model knows kept
        frames by their latents.
        Raises `T3Error` for an image that cannot be read, or where memory does not suffice for the encode.
        """
        key = clip.height, clip.width, clip.frames, clip.image, clip.last_image
        if self._last[0] != key:
            self._last = key, self._make(clip)
        return self._last[1]

    def _make(self, clip: Clip) -> dict[str, torch.Tensor]:
        made = self._encoded(among_grey(clip.frames, clip.height, clip.width, {}))
        kept = self._encoded(kept_frames(clip)) if clip.image else made
        _, _, frames, height, width = made.shape
        mask = latent_mask(frame_mask(clip), frames).to(self.device)
        scale = self.vae.config.scale_factor_spatial
        return {
            "video": torch.cat([kept, made], dim=1),
            "mask": mask.view(1, 1, -1, 1, 1).expand(1, scale**2, frames, height, width),
        }

    def _encoded(self, frames: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(self.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        return ((self.encode(frames).float() - mean) / std).to(self.device)


def frame_mask(clip: Clip) -> torch.Tensor:
    """`[frames]`: 0 for those that are kept, the first and the last where there are images for them; 1 for others."""
    return mask_of(clip.frames, [frame for frame, path in ((0, clip.image), (-1, clip.last_image)) if path])


def mask_of(frames: int, kept: Sequence[int]) -> torch.Tensor:
    """`[frames]`: 0 for the frames of these numbers, 1 for others."""
    mask = torch.ones(frames)
    for frame in kept:
        mask[frame] = 0
    return mask


def latent_mask(mask: torch.Tensor, latent_frames: int) -> torch.Tensor:
    """`[latent_frames]` of a mask `[frames]`: for each latent frame that of the frame in its middle, as published."""
    middles = (torch.arange(latent_frames) + 0.5) * (len(mask) / latent_frames)
    return mask[middles.long()]


def kept_frames(clip: Clip) -> torch.Tensor:
    """`[1, frames, H, W, 3]` in uint16: the clip's images where they stand, and grey everywhere else."""
    return among_grey(clip.frames, clip.height, clip.width, pictures(clip))


def pictures(clip: Clip) -> dict[int, torch.Tensor]:
    """The clip's images by the number of their frame, 0 and -1: `[H, W, 3]` in uint8, at the clip's size."""
    given = {}
    for frame, path in ((0, clip.image), (-1, clip.last_image)):
        if path:
            pixels = torch.frombuffer(bytearray(load_image(path, clip.height, clip.width).tobytes()), dtype=torch.uint8)
            given[frame] = pixels.view(clip.height, clip.width, 3)
    return given


def among_grey(frames: int, height: int, width: int, given: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """`[1, frames, H, W, 3]` in uint16: pictures `[H, W, 3]` in uint8 at the frames of their numbers, else grey."""
    if not given:
        return torch.tensor(_GREY, dtype=torch.uint16).expand(1, frames, height, width, 3)
    made = torch.full((1, frames, height, width, 3), _GREY, dtype=torch.uint16)
    for frame, pixels in given.items():
        made[0, frame] = (pixels.int() * 257).to(torch.uint16)
    return made
