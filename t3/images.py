"""Images to start a clip from. PIL only, so that a bad one is found before torch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import T3Error

if TYPE_CHECKING:
    from PIL import Image


def load_image(path: Path, height: int, width: int) -> Image.Image:
    """An image as RGB, scaled and cropped about its centre to `height` x `width`. Raises `T3Error` if unreadable."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise T3Error(f"the image {path} does not exist.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for broken PNGs
        raise T3Error(f"{path} cannot be read as an image: {error}.") from None
    return ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
