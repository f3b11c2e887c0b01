"""T3 VAE Decode and T3 VAE Decode to Video: latents to pixels in exact tiles."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..t3.errors import T3Error
from ..t3.video import check_video, crop_frames, crop_rows, frame_rate
from .families import MOST_PIXELS
from .frame_buffer import new_frames, new_images
from .frames_video import FramesVideo
from .host_decode import Decode
from .verdict import verdict

_LEAST_TILE = 16  # pixels: one latent of Wan2.2
_INSTEAD_OF_IMAGES = (
    "Use T3 VAE Decode to Video, which needs a quarter or half of that, on a disk if need be, or decode fewer frames."
)
_DEPTHS = {8: torch.uint8, 10: torch.uint16}


class T3VAEDecode(io.ComfyNode):
    """In place of VAE Decode and VAE Decode (Tiled): inputs have the same names, and no more are required."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3VAEDecode",
            display_name="T3 VAE Decode",
            category="T3",
            description=(
                "Decodes Wan latents to images in tiles that fit the memory and leave no seams: the same pixels as one "
                "big decode."
            ),
            search_aliases=["vae decode", "vae decode tiled", "tiled decode", "4k decode", "latent to image"],
            inputs=[*_latents_and_vae(), _crop(), tile_size_input("pixels of the result")],
            outputs=[
                io.Image.Output("IMAGE", display_name="images", tooltip="All frames, as from VAE Decode."),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, crop=None, tile_size=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        return verdict(_check, crop, tile_size)

    @classmethod
    def execute(cls, samples, vae, crop=0, tile_size=0) -> io.NodeOutput:
        _check(crop, tile_size)
        decode = Decode.of(vae, samples)
        batch, frames, height, width, _ = decode.shape
        crop_rows(height, crop or height)
        shape = (batch * frames, height, width, 3)
        images = new_images(shape, vae.vae_output_dtype(), vae.output_device, _INSTEAD_OF_IMAGES)
        how = decode.into(images.view(decode.shape), tile_size)
        return io.NodeOutput(crop_frames(images, crop or height), f"{_about(decode, crop)}\n{how}")


class T3VAEDecodeToVideo(io.ComfyNode):
    """In place of VAE Decode and Create Video, without the frames as floats between them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3VAEDecodeToVideo",
            display_name="T3 VAE Decode to Video",
            category="T3",
            description=(
                "Decodes Wan latents straight to a video for Save Video: exact tiles without seams, and a quarter to "
                "half of the memory that images take."
            ),
            search_aliases=["vae decode video", "latent to video", "create video", "4k video", "tiled decode"],
            inputs=[
                *_latents_and_vae(),
                io.Float.Input(
                    "fps",
                    default=30.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames per second. The T3 models were trained with 30, Wan's own with 16 or 24.",
                ),
                io.Int.Input(
                    "bit_depth",
                    default=8,
                    min=8,
                    max=10,
                    step=2,
                    optional=True,
                    display_mode=io.NumberDisplay.number,
                    tooltip="8 plays everywhere. 10 has smoother gradients and takes twice the memory.",
                ),
                _crop(),
                tile_size_input("pixels of the result"),
                io.Audio.Input("audio", optional=True, tooltip="Sound for the video; cut where the frames end."),
            ],
            outputs=[
                io.Video.Output("VIDEO", display_name="video", tooltip="The video, for Save Video."),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, fps=None, bit_depth=None, crop=None, tile_size=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        return verdict(_check, crop, tile_size, fps, bit_depth)

    @classmethod
    def execute(cls, samples, vae, fps, bit_depth=8, crop=0, tile_size=0, audio=None) -> io.NodeOutput:
        _check(crop, tile_size, fps, bit_depth)
        decode = Decode.of(vae, samples)
        batch, frames, height, width, _ = decode.shape
        crop_rows(height, crop or height)
        rate = frame_rate(fps)
        _check_writable(width, crop or height, rate, bit_depth)
        buffer = new_frames((batch * frames, height, width, 3), _DEPTHS[bit_depth])
        # Made before the work, because it looks at the audio; the frames come into the buffer it holds.
        video = FramesVideo(crop_frames(buffer, crop or height), rate, audio)
        how = decode.into(buffer.view(decode.shape), tile_size)
        seconds = f"{video.get_duration():,.2f} s at {float(rate):g} frames per second, {bit_depth} bits"
        return io.NodeOutput(video, f"{_about(decode, crop)}\n{seconds}\n{how}")


def _latents_and_vae() -> list[io.Input]:
    return [
        io.Latent.Input("samples", tooltip="Latents of a Wan model, from KSampler or T3 Load Latent."),
        io.Vae.Input("vae", tooltip="The VAE of that model: Wan2.1 for 16 channels, Wan2.2 for 48."),
    ]


def _crop() -> io.Input:
    return io.Int.Input(
        "crop",
        default=0,
        min=0,
        max=MOST_PIXELS,
        step=2,
        optional=True,
        tooltip="0: all rows. Otherwise so many rows about the middle: 2160 makes 3840x2176 the usual 4K.",
    )


def tile_size_input(same: str) -> io.Input:
    """The input `tile_size`; same: what does not depend on it, in words."""
    return io.Int.Input(
        "tile_size",
        default=0,
        min=0,
        max=MOST_PIXELS,
        step=16,
        optional=True,
        tooltip=f"0: from the free memory. Otherwise pixels along a tile's side; the {same} are the same.",
        advanced=True,
    )


def report_output() -> io.Output:
    return io.String.Output("REPORT", display_name="report", tooltip="Size, tiles and seconds, and what went amiss.")


def _check(crop, tile_size, fps=None, bit_depth=None) -> None:
    """Raise `T3Error` for widgets that cannot be meant. None stands for what comes over a link."""
    if crop is not None and (crop < 0 or crop > MOST_PIXELS or crop % 2):
        nearest = min(max(crop // 2 * 2, 0), MOST_PIXELS)
        raise T3Error(f"crop is {crop}; it is 0 or an even number of rows up to {MOST_PIXELS}. Nearest: {nearest}.")
    check_tile_size(tile_size)
    if fps is not None:
        frame_rate(fps)
    if bit_depth is not None and bit_depth not in _DEPTHS:
        raise T3Error(f"bit_depth is {bit_depth}; a video is written with 8 or 10. Nearest: 8.")


def check_tile_size(tile_size: int | None) -> None:
    if tile_size is not None and tile_size != 0 and not _LEAST_TILE <= tile_size <= MOST_PIXELS:
        nearest = min(max(tile_size, _LEAST_TILE), MOST_PIXELS)
        raise T3Error(f"tile_size is {tile_size}; it is 0 or {_LEAST_TILE} to {MOST_PIXELS}. Nearest: {nearest}.")


def _check_writable(width: int, height: int, rate, bit_depth: int) -> None:
    """Refuse now what could not be saved after the work."""
    import folder_paths

    try:
        check_video(
            f"{folder_paths.get_temp_directory()}/video.mp4",
            width=width,
            height=height,
            fps=rate,
            bit_depth=bit_depth,
            overwrite=True,
        )
    except T3Error as error:
        raise T3Error(f"no video can be made of this: {error}") from error


def _about(decode: Decode, crop: int) -> str:
    batch, frames, height, width, _ = decode.shape
    clips = f"{batch} clips of {frames} frames, one after the other" if batch > 1 else f"{frames} frames"
    clips = "1 frame" if batch == frames == 1 else clips
    cropped = f" (cropped from {height} rows)" if crop and crop != height else ""
    return f"{width} x {crop or height} pixels{cropped}, {clips}, {decode.structure.generation} VAE"
