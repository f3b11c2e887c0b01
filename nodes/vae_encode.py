"""T3 VAE Encode: images to latents in exact tiles, also as the beginning of a longer video."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import torch
from comfy_api.latest import io

from ..t3.errors import T3Error
from ..t3.plan import VIDEO_FRAMES_PER_LATENT
from .families import MOST_FRAMES
from .host_encode import Encode
from .vae_decode import check_tile_size, report_output, tile_size_input
from .verdict import verdict

_FORMATS = {"Wan2.1": comfy.latent_formats.Wan21, "Wan2.2": comfy.latent_formats.Wan22}


class T3VAEEncode(io.ComfyNode):
    """In place of VAE Encode and VAE Encode (Tiled): inputs have the same names, and no more are required.

    With a `length`, and Upscale Image before it, in place of Wan22ImageToVideoLatent.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3VAEEncode",
            display_name="T3 VAE Encode",
            category="T3",
            description=(
                "Encodes images to Wan latents in tiles that fit the memory and leave no seams: the same latents as "
                "one big encode. Also starts a video from an image, for Wan2.2 5B."
            ),
            search_aliases=[
                "vae encode",
                "vae encode tiled",
                "tiled encode",
                "4k encode",
                "image to latent",
                "image to video",
                "start image",
                "video to video",
            ],
            inputs=[
                io.Image.Input("pixels", tooltip="An image, or the frames of one video."),
                io.Vae.Input("vae", tooltip="The VAE of the model: Wan2.2 for Wan2.2 5B, Wan2.1 for all others."),
                io.Int.Input(
                    "length",
                    default=1,
                    min=1,
                    max=MOST_FRAMES,
                    step=VIDEO_FRAMES_PER_LATENT,
                    optional=True,
                    tooltip=(
                        "1: only the images. Otherwise frames of the video, 5, 9, ... 81, that begins with them; the "
                        "sampler makes the rest. For Wan2.2 5B."
                    ),
                ),
                tile_size_input("latents"),
            ],
            outputs=[
                io.Latent.Output("LATENT", display_name="latent", tooltip="Latents, for KSampler or T3 VAE Decode."),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, length=None, tile_size=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason. None stands for what comes over a link."""
        return verdict(_check, length, tile_size)

    @classmethod
    def execute(cls, pixels, vae, length=1, tile_size=0) -> io.NodeOutput:
        _check(length, tile_size)
        encode = Encode.of(vae, pixels)
        count = encode.frames.shape[1]
        if length > count and encode.structure.generation != "Wan2.2":
            encode.say(
                f"encode: length is {length}, but models with the {encode.structure.generation} VAE do not start from "
                "latents. An image-to-video model takes its start image through WanImageToVideo."
            )
        if 1 < length <= count:
            encode.say(f"encode: length is {length}, and the images alone make {count} frames, so no others follow.")
        latents, how = encode.latents(tile_size)
        latent = {"samples": latents}
        if length > count:
            latent = _beginning(latents, length, _FORMATS[encode.structure.generation]())
        return io.NodeOutput(latent, f"{_about(encode, length)}\n{how}")


def _beginning(start: torch.Tensor, length: int, latent_format: comfy.latent_formats.LatentFormat) -> dict[str, Any]:
    """Latents of `length` frames that begin with `start`, and the mask that has samplers keep it.

    As Wan22ImageToVideoLatent makes them: to samplers the rest is zeros, and the mask 0 where latents stay.
    """
    batch, channels, there, height, width = start.shape
    size = (length - 1) // VIDEO_FRAMES_PER_LATENT + 1, height, width
    samples = latent_format.process_out(torch.zeros(batch, channels, *size, device=start.device))
    samples[:, :, :there] = start
    mask = torch.ones(batch, 1, *size, device=start.device)
    mask[:, :, :there] = 0
    return {"samples": samples, "noise_mask": mask}


def _check(length: int | None, tile_size: int | None) -> None:
    check_tile_size(tile_size)
    if length is not None and (not 1 <= length <= MOST_FRAMES or (length - 1) % VIDEO_FRAMES_PER_LATENT):
        steps = round((length - 1) / VIDEO_FRAMES_PER_LATENT) * VIDEO_FRAMES_PER_LATENT
        nearest = min(max(1 + steps, 1), MOST_FRAMES)
        raise T3Error(f"length is {length}; a video has 1, 5, 9, ... {MOST_FRAMES} frames. Nearest: {nearest}.")


def _about(encode: Encode, length: int) -> str:
    batch, count, height, width, _ = encode.frames.shape
    clips = f"{batch} clips of {count} frames" if batch > 1 else f"{count} frame{'s' if count > 1 else ''}"
    begun = f", the beginning of {length}" if length > count else ""
    return f"{width} x {height} pixels, {clips}{begun}, {encode.structure.generation} VAE"
