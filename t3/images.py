"""Images to start a clip from, and to end it in. PIL only, so that a bad one is found before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import T3Error

if TYPE_CHECKING:
    from PIL import Image

    from .jobs import Clip
    from .sources import Sources


_GIVE_FIRST = 'Name one: "image" in a prompt file, or --image in t3.generate.'
_GIVE_LAST = 'Name one: "last_image" in a prompt file, or --last-image in t3.generate.'


def load_image(path: Path, height: int, width: int) -> Image.Image:
    """An image as RGB, scaled and cropped about its centre to `height` x `width`. Raises `T3Error` if unreadable."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(_eight_bit(image, path)).convert("RGB")
    except (T3Error, MemoryError):
        raise
    except FileNotFoundError:
        raise T3Error(f"the image {path} does not exist.") from None
    except Exception as error:  # for a damaged file each of PIL's readers has its own, RuntimeError and ValueError too
        raise T3Error(f"{path} cannot be read as an image: {error}.") from None
    return ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)


def _eight_bit(image: Image.Image, path: Path) -> Image.Image:
    """Grey images of 16 bits in 8, which `convert` would cut off at 255. Raises `T3Error` for wider numbers."""
    # These have no more than 16 bits, of which PIL makes wider numbers: of PGM always, of PNG in some releases.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("I", "F"):
        raise T3Error(f"{path} has pixels of 32 bits, whose range is not known. Save it with 8 or 16 bits.")
    return image


def check_images(clips: Iterable[tuple[str, Clip]], sources: Sources) -> None:
    """Raise `T3Error` for a clip, called by its name, whose images this model does not take, lacks, or cannot read."""
    both = sources.transformer.get("pos_embed_seq_len") is not None  # trained on first and last frame together
    seen: set[Path] = set()
    for name, clip in clips:
        image, last = clip.image, clip.last_image
        if last and not image:
            raise T3Error(f"{name!r} has a last image, and none to start from. {_GIVE_FIRST}")
        if image and not sources.takes_image:
            raise T3Error(
                f"{sources.name} is a text-to-video model and takes no image. Use an I2V or VACE model, or Wan2.2 5B."
            )
        if last and not sources.takes_last_image:
            raise T3Error(f"{sources.name} takes no last image. Use a first-and-last-frame, I2V or VACE model.")
        if sources.needs_image and not image:
            raise T3Error(f"{sources.name} is an image-to-video model, and {name!r} has no image. {_GIVE_FIRST}")
        if both and not last:
            raise T3Error(
                f"{sources.name} starts from a first and a last frame, and {name!r} has no last image. {_GIVE_LAST}"
            )
        for path in {path for path in (image, last) if path} - seen:
            load_image(path, clip.height, clip.width)
            seen.add(path)
