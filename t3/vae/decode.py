"""Decode of Wan latents in exact tiles, within a stated amount of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ..errors import T3Error
from .attempt import Meter, Say, attempt, out_of_memory, tile_by_tile, wait_for
from .decoder import WanDecoder
from .output import Outlet, check_out
from .past import Past
from .plan import Plan, make_plan
from .tiles import Window

Progress = Callable[[int, int], object]


@torch.no_grad()
def decode_frames(
    decoder: WanDecoder,
    latents: torch.Tensor,
    *,
    memory: int | None = None,
    tile: int | tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> torch.Tensor:
    """Decode latents to frames, tile by tile, with the numbers of the untiled decoder: no seams and no blending.

    Args:
        decoder: of a Wan2.1 or Wan2.2 VAE; it decides device and dtype of the arithmetic.
        latents: `[B, C, T, H, W]`, any float dtype, device and strides, in the VAE's own space: what ComfyUI's
            `VAE.decode` and diffusers' `AutoencoderKLWan.decode` take. Samplers' outputs are in it: ComfyUI's KSampler
            and diffusers' pipelines have by then undone the scaling by the latents' mean and deviation.
        memory: bytes that may be taken on the decoder's device beyond its weights, `latents` and `out`. If None, most
            of what is free there.
        tile: height and width of a tile without its halo, in pixels (one number for both), rounded down to whole
            latents: 8 pixels for Wan2.1, 16 for Wan2.2. If None, the one with the least work that fits the memory.
        out: where to write, `[B, frames, H, W, 3]` on any device, strides as you like; uint8 and uint16 hold [0, 1] as
            0 to 255 and 0 to 65535, rounded to nearest, floats as it is. If None, a new tensor on the CPU, float32
            (float64 if the decoder's dtype is).
        progress: called with work done and work in all after every frame of a tile. May raise to cancel: the exception
            is passed on, and of `out` only whole tiles are decoded.
        say: told in words what the decode resorts to; by default a line of the log.

    Returns:
        `out`: `[B, frames, H, W, 3]`; one frame for the first latent frame, four for every other.

    Raises:
        T3Error: before any work, for latents that this VAE does not decode or that are not finite, an `out` that does
            not fit, or too little memory; later, if the device's memory runs out even with tiles of one latent, or the
            decoder's arithmetic gives NaN.
    """
    check_latents(decoder, latents)
    structure = decoder.structure
    batch, _, frames, height, width = latents.shape
    scale = structure.scale
    shape = (batch, structure.frames(frames), height * scale, width * scale, 3)
    if out is not None:
        check_out(out, shape)
    plan = make_plan(structure, (frames, height, width), decoder.device, decoder.dtype.itemsize, memory, tile)
    if out is None:
        out = torch.empty(shape, dtype=torch.float64 if decoder.dtype == torch.float64 else torch.float32)
    meter = Meter(progress, batch * height * width * (frames + structure.frames(frames)))
    for clip, frames_out in zip(latents, out, strict=True):
        ClipDecode(decoder, clip[None], frames_out, plan, meter, say or logging.getLogger(__name__).warning).decode()
    return out


class ClipDecode:
    """One clip on its way: latents `[1, C, T, H, W]` into `out` `[frames, H, W, 3]`."""

    def __init__(
        self, decoder: WanDecoder, latents: torch.Tensor, out: torch.Tensor, plan: Plan, meter: Meter, say: Say
    ):
        self.decoder, self.latents, self.out, self.plan, self.meter, self.say = decoder, latents, out, plan, meter, say
        self.frames = decoder.structure.frames(latents.shape[2])

    def decode(self) -> None:
        whole = Window.whole(*self.latents.shape[3:])
        self.tiles([whole], self._middle(whole))

    def tiles(self, parts: Iterable[Window], hidden: list[torch.Tensor]) -> None:
        """Decode these parts of the picture. hidden: the middle stage's result for each latent frame, whole."""
        tile_by_tile(
            parts,
            self.plan,
            lambda core: self._attempt(partial(self._tile, hidden, core)),
            "decode",
            self.decoder.device,
            self.decoder.structure.scale,
            self.say,
        )

    def _attempt(self, work: Callable[[], None]) -> bool:
        return attempt(work, self.decoder.device, self.meter)

    def _middle(self, whole: Window) -> list[torch.Tensor]:
        """The middle stage's result for each latent frame, on `plan.keep_on`."""
        hidden: list[torch.Tensor] = []

        def work() -> None:
            hidden.clear()
            past = Past(self.latents.shape[2])
            for latent in self.latents.unbind(2):
                latent = latent.to(self.decoder.device, self.decoder.dtype)
                hidden.append(self.decoder.middle(latent, past, self.plan.scores).to(self.plan.keep_on))
                wait_for(self.decoder.device)
                self.meter.add(whole.area)

        if not self._attempt(work):
            self.plan.keep_on, self.plan.scores = torch.device("cpu"), self.plan.scores // 4
            self.say("decode: memory ran out in the middle stage; going on with its results in main memory.")
            if not self._attempt(work):
                raise out_of_memory(self.decoder.device, "run the middle stage on one latent frame", "decode")
        return hidden

    def _tile(self, hidden: list[torch.Tensor], core: Window) -> None:
        """Decode one tile, all of its time, into `out`."""
        windows = self.decoder.windows(core)
        past, outlet = Past(self.frames), self.outlet(core.scaled(self.decoder.structure.scale))
        for whole in hidden:
            x = whole[windows[0][0].here].to(self.decoder.device)
            for frame in self.decoder.pixels(x, past, core, windows):
                outlet.put(frame[0])
                self.meter.add(core.area)
        outlet.finish()

    def outlet(self, pixels: Window) -> Outlet:
        """Where the frames of this part of the picture go."""
        return Outlet(self.out[:, pixels.rows.here, pixels.cols.here], self.decoder.device)


def check_latents(decoder: WanDecoder, latents: torch.Tensor) -> None:
    structure = decoder.structure
    shape = tuple(latents.shape)
    if latents.ndim != 5:
        raise T3Error(
            f"latents have shape {shape}; video latents are [B, C, T, H, W]."
            + (" For one frame each, give latents[:, :, None]." if latents.ndim == 4 else "")
        )
    if latents.shape[1] != structure.latent_channels:
        raise T3Error(
            f"these latents have {shape[1]} channels and this {structure.generation} VAE decodes "
            f"{structure.latent_channels}. Latents of Wan2.1 and A14B (16) go with the Wan2.1 VAE, those of Wan2.2 5B "
            "(48) with the Wan2.2 VAE."
        )
    if not all(shape):
        raise T3Error(f"latents have shape {shape}: there is nothing in them to decode.")
    if not latents.is_floating_point():
        raise T3Error(f"latents have dtype {latents.dtype}; give a float dtype.")
    bad = [i for i, frame in enumerate(latents.unbind(2)) if not torch.isfinite(frame).all()]
    if bad:
        raise T3Error(
            f"latents hold NaN or infinity in latent frame {bad[0]} (in {len(bad)} of {shape[2]} frames), so there is "
            "no picture to decode. Sampling went wrong: try bfloat16 or float32 instead of float16, or other settings."
        )
