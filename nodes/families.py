"""The two families of Wan latents, the sizes people want, and what is legal for whom."""

from __future__ import annotations

from typing import NamedTuple

from ..t3 import Grid
from ..t3.plan import VIDEO_FRAMES_PER_LATENT


class Family(NamedTuple):
    """Channels of the latents, pixels of one latent along height and width, pixels of one token."""

    channels: int
    scale: int

    @property
    def pixels_per_token(self) -> int:
        return 2 * self.scale


FAMILIES = {"Wan2.1, Wan2.2 14B": Family(16, 8), "Wan2.2 5B": Family(48, 16)}
# Width and height in pixels; the portrait of each is the same turned. Rounded down to whole tokens where need be.
_LANDSCAPE = {"4K": (3840, 2176), "1440p": (2560, 1440), "1080p": (1920, 1088), "720p": (1280, 720)}
SIZES = {
    f"{name} {way}": pixels if way == "landscape" else pixels[::-1]
    for name, pixels in _LANDSCAPE.items()
    for way in ("landscape", "portrait")
}


class Video(NamedTuple):
    """A legal clip: its size in pixels, its grid of tokens and the shape of one clip's latents `[C, T, H, W]`."""

    frames: int
    height: int
    width: int
    grid: Grid
    latent: tuple[int, int, int, int]


def video(size: str, family: str, frames: int, width: int = 0, height: int = 0) -> Video:
    """The clip of a named size, or of `width` and `height` pixels where those are not 0.

    Raises `T3Error` naming the nearest legal value for what the family cannot make.
    """
    kind = FAMILIES[family]
    named_width, named_height = (n // kind.pixels_per_token * kind.pixels_per_token for n in SIZES[size])
    width, height = width or named_width, height or named_height
    grid = Grid.from_video(frames, height, width, kind.pixels_per_token)
    latent_frames = (frames - 1) // VIDEO_FRAMES_PER_LATENT + 1
    latent = (kind.channels, latent_frames, height // kind.scale, width // kind.scale)
    return Video(frames, height, width, grid, latent)
