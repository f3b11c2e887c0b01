"""Encode of frames to Wan latents in exact tiles, within a stated amount of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..errors import T3Error
from .attempt import Meter, Say, attempt, out_of_memory, tile_by_tile, wait_for
from .down_layers import DownPast
from .down_plan import make_down_plan
from .encoder import WanEncoder
from .frames import as_input, check_frames
from .past import Past
from .plan import Plan
from .sums import layout
from .tiles import Window

Progress = Callable[[int, int], object]


@torch.no_grad()
def encode_frames(
    encoder: WanEncoder,
    frames: torch.Tensor,
    *,
    memory: int | None = None,
    tile: int | tuple[int, int] | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> torch.Tensor:
    """Encode frames to latents, tile by tile, with the numbers of the untiled encoder: no seams and no blending.

    Args:
        encoder: of a Wan2.1 or Wan2.2 VAE; it decides device and dtype of the arithmetic.
        frames: `[B, frames, H, W, 3]`, RGB, on any device, strides as you like; floats in [0, 1], or uint8 and uint16
            that hold it as 0 to 255 and 0 to 65535. H and W are multiples of 8 (Wan2.1) or 16 (Wan2.2); frames are
            4 n + 1, one for a picture.
        memory: bytes that may be taken on the encoder's device beyond its weights and `frames`. If None, most of what
            is free there.
        tile: height and width of a tile without its halo, in pixels (one number for both), rounded down to whole
            latents. If None, the one with the least work that fits the memory.
        progress: called with work done and work in all after every frame of a tile. May raise to cancel: the exception
            is passed on.
        say: told in words what the encode resorts to, and of frames that look as if they were in [-1, 1]; by default a
            line of the log.

    Returns:
        Latents `[B, C, T, H/8, W/8]` (Wan2.2: `H/16, W/16`) on the CPU, float32 (float64 if the encoder's dtype is):
        the mean of the posterior, in the VAE's own space. That is what ComfyUI's `VAE.encode` and diffusers'
        `AutoencoderKLWan.encode(...).latent_dist.mode()` give for the same frames, and what `decode_frames` takes:
        not yet scaled by the latents' mean and deviation, which ComfyUI's samplers do themselves and diffusers'
        pipelines do as `(latents - mean) / std`. One latent frame for the first frame, then one for every four.

    Raises:
        T3Error: before any work, for frames of another shape, size, dtype or range or that are not finite, or too
            little memory; later, if the device's memory runs out even with tiles of one latent, or the encoder's
            arithmetic gives NaN.
    """
    structure = encoder.structure
    say = say or logging.getLogger(__name__).warning
    check_frames(frames, structure, say)
    batch, count, height, width, _ = frames.shape
    size = structure.latent_frames(count), height // structure.scale, width // structure.scale
    plan = make_down_plan(structure, size, encoder.device, encoder.dtype.itemsize, memory, tile)
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    latents = torch.empty(batch, structure.latent_channels, *size, dtype=dtype)
    meter = Meter(progress, batch * size[1] * size[2] * (count + size[0]))
    for clip, found in zip(frames, latents, strict=True):
        ClipEncode(encoder, clip, found, plan, meter, say).encode()
    return latents


class ClipEncode:
    """One clip on its way: `frames` `[frames, H, W, 3]` into `latents` `[C, T, H, W]`."""

    def __init__(
        self, encoder: WanEncoder, frames: torch.Tensor, latents: torch.Tensor, plan: Plan, meter: Meter, say: Say
    ) -> None:
        self.encoder, self.frames, self.latents = encoder, frames, latents
        self.plan, self.meter, self.say = plan, meter, say

    def encode(self) -> None:
        whole = Window.whole(*self.latents.shape[2:])
        features = self.room()
        self.tiles([whole], features)
        self._middle(features, whole)

    def tiles(self, parts: Iterable[Window], features: list[torch.Tensor]) -> None:
        """Take these parts of the picture, in latents, down to the middle stage's input, into whole frames of it."""
        tile_by_tile(
            parts,
            self.plan,
            lambda core: self._attempt(partial(self._tile, features, core)),
            "encode",
            self.encoder.device,
            self.encoder.structure.scale,
            self.say,
        )

    def _attempt(self, work: Callable[[], None]) -> bool:
        return attempt(work, self.encoder.device, self.meter)

    def room(self) -> list[torch.Tensor]:
        """Where tiles put the middle stage's input: for each latent frame a whole frame, on `plan.keep_on`."""
        features: list[torch.Tensor] = []
        _, frames, height, width = self.latents.shape
        shape = 1, self.encoder.structure.width, height, width
        dtype, order = self.encoder.dtype, layout(self.encoder.device)

        def work() -> None:
            features.clear()
            for _ in range(frames):
                features.append(torch.empty(shape, dtype=dtype, device=self.plan.keep_on, memory_format=order))

        if not self._attempt(work):
            self.plan.keep_on = torch.device("cpu")
            self.say("encode: no memory for the middle stage's input; going on with it in main memory.")
            if not self._attempt(work):
                raise out_of_memory("main memory", "keep the middle stage's input", "encode")
        return features

    def _tile(self, features: list[torch.Tensor], core: Window) -> None:
        """One tile, all of its time, down to the middle stage's input."""
        encoder = self.encoder
        windows = encoder.windows(core)
        pixels = windows.pixels.scaled(encoder.structure.patch)
        past, number = DownPast(len(self.frames)), 0
        for frame in self.frames:
            x = as_input(frame[pixels.rows.here, pixels.cols.here], encoder.device, encoder.dtype)
            found = encoder.features(x, past, windows)
            if found is not None:
                features[number][core.here] = found.to(self.plan.keep_on)
                number += 1
                wait_for(encoder.device)
            self.meter.add(core.area)

    def finite(self, mean: torch.Tensor) -> torch.Tensor:
        """`mean`, unless it holds NaN or infinity: a T3Error then."""
        if not torch.isfinite(mean).all():
            raise T3Error(
                f"encoding in {self.encoder.dtype} gave NaN or infinity. float16 overflows with some weights: encode "
                "in bfloat16 or float32. If it was not float16, the VAE's weights are damaged."
            )
        return mean

    def _middle(self, features: list[torch.Tensor], whole: Window) -> None:
        """The middle stage, one latent frame after the other, into `latents`."""

        def work() -> None:
            past = Past(len(features))
            for number, x in enumerate(features):
                mean = self.encoder.middle(x.to(self.encoder.device), past, self.plan.scores)
                self.latents[:, number] = self.finite(mean[0].to(self.latents))
                self.meter.add(whole.area)

        if not self._attempt(work):
            self.plan.keep_on, self.plan.scores = torch.device("cpu"), self.plan.scores // 4
            for number, x in enumerate(features):
                features[number] = x.to(self.plan.keep_on)
            self.say("encode: memory ran out in the middle stage; going on with its input in main memory.")
            del x
            if not self._attempt(work):
                raise out_of_memory(self.encoder.device, "run the middle stage on one latent frame", "encode")
