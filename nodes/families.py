"""The two families of Wan latents, the sizes people want, what is legal for whom, and the inputs that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from comfy_api.latest import io

from ..t3 import Grid
from ..t3.cost import ModelShape
from ..t3.errors import T3Error
from ..t3.plan import VIDEO_FRAMES_PER_LATENT
from ..t3.weights import known_config
from .verdict import verdict

MOST_PIXELS = 16384  # along one side, as everywhere in ComfyUI
MOST_FRAMES = 8193
_PATCH = 2  # latents of one token along height and width


class Family(NamedTuple):
    """Latent channels, pixels of one latent along height and width, and the model whose cost is told."""

    name: str
    channels: int
    scale: int
    model: str
    config: str

    @property
    def pixels_per_token(self) -> int:
        return _PATCH * self.scale

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(known_config(self.config))


FAMILIES = {
    family.name: family
    for family in (
        Family("Wan2.1, Wan2.2 14B", 16, 8, "Wan2.1 1.3B", "wan2.1-t2v-1.3b"),
        Family("Wan2.2 5B", 48, 16, "Wan2.2 5B", "wan2.2-ti2v-5b"),
    )
}
# Width and height in pixels; the portrait of each is the same turned. Rounded down to whole tokens where need be.
_LANDSCAPE = {"4K": (3840, 2176), "1440p": (2560, 1440), "1080p": (1920, 1088), "720p": (1280, 720)}
SIZES = {
    f"{name} {way}": pixels if way == "landscape" else pixels[::-1]
    for name, pixels in _LANDSCAPE.items()
    for way in ("landscape", "portrait")
}


class Video(NamedTuple):
    """A clip: its family, its size in pixels, its grid of tokens and the shape of its latents `[C, T, H, W]`."""

    family: Family
    frames: int
    height: int
    width: int
    grid: Grid
    latent: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"{self.width} x {self.height} pixels, {self.frames} frame{'s' if self.frames > 1 else ''}"


def video(size: str, family: str, frames: int, width: int = 0, height: int = 0) -> Video:
    """The clip of a named size, or of `width` and `height` pixels where those are not 0.

    Raises `T3Error` naming the nearest legal value for what the family cannot make.
    """
    if family not in FAMILIES or size not in SIZES:
        wrong, known = (family, FAMILIES) if family not in FAMILIES else (size, SIZES)
        raise T3Error(f"{wrong!r} is not offered. Choose one of: {'; '.join(known)}.")
    kind = FAMILIES[family]
    for name, value in (("frames", frames), ("width", width), ("height", height)):
        most = MOST_FRAMES if name == "frames" else MOST_PIXELS
        if value > most:
            raise T3Error(f"{name} is {value}; the most is {most}. Nearest: {most}.")
    named_width, named_height = (n // kind.pixels_per_token * kind.pixels_per_token for n in SIZES[size])
    width, height = width or named_width, height or named_height
    grid = Grid.from_video(frames, height, width, kind.pixels_per_token)
    latent = (kind.channels, grid.t, height // kind.scale, width // kind.scale)
    return Video(kind, frames, height, width, grid, latent)


def size_inputs(remark: str = "") -> list[io.Input]:
    """The inputs `size`, `family` and `frames`; `remark` ends their tooltips."""
    return [
        io.Combo.Input(
            "size",
            options=list(SIZES),
            default=next(iter(SIZES)),
            tooltip="Picture size. 4K is 3840x2176, the size T3 was released for; crop to 2160 rows later." + remark,
        ),
        io.Combo.Input(
            "family",
            options=list(FAMILIES),
            default=next(iter(FAMILIES)),
            tooltip="Which model it is for: one with the Wan2.1 VAE (16 channels), or Wan2.2 5B (48)." + remark,
        ),
        io.Int.Input(
            "frames",
            default=81,
            min=1,
            max=MOST_FRAMES,
            step=VIDEO_FRAMES_PER_LATENT,
            tooltip="Frames of video: 1, 5, 9, ... 81, and so on." + remark,
        ),
    ]


def pixel_inputs() -> list[io.Input]:
    """The inputs `width` and `height`, for sizes that have no name."""
    return [
        io.Int.Input(
            name,
            default=0,
            min=0,
            max=MOST_PIXELS,
            step=16,
            tooltip="0: that of the size above. Otherwise pixels, used instead.",
            advanced=True,
        )
        for name in ("width", "height")
    ]


def widget_problem(family: str | None, frames: int | None, width: int | None, height: int | None) -> bool | str:
    """For `validate_inputs`: True, or why there is no such clip. None stands for a value that comes over a link."""
    return verdict(
        video,
        next(iter(SIZES)),
        next(iter(FAMILIES)) if family is None else family,
        1 if frames is None else frames,
        width or 0,
        height or 0,
    )


def video_of_latents(shape: Sequence[int]) -> Video:
    """The clip that latents of `shape` `[B, C, T, H, W]` decode to. An odd side is padded to whole tokens by the model.

    Raises `T3Error` for latents of no Wan model.
    """
    families = {family.channels: family for family in FAMILIES.values()}
    if len(shape) != 5 or shape[1] not in families or not all(shape):
        raise T3Error(
            f"these latents have the shape {' x '.join(map(str, shape))}; Wan's are batch x 16 or 48 channels x frames "
            "x height x width. Use latents of T3 Empty Latent or of a Wan model."
        )
    kind = families[shape[1]]
    _, channels, t, h, w = shape
    grid = Grid(t, -(-h // _PATCH), -(-w // _PATCH))
    return Video(kind, (t - 1) * VIDEO_FRAMES_PER_LATENT + 1, h * kind.scale, w * kind.scale, grid, (channels, t, h, w))
