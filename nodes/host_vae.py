"""From ComfyUI's loaded VAE to our decoder: what it can decode, room on its device, progress, cancel and previews."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..t3.errors import T3Error
from ..t3.vae import WanDecoder, decode_frames
from ..t3.vae.choice import choices, weigh
from ..t3.vae.memory import free_bytes, free_needed, kept_bytes, middle_bytes
from ..t3.vae.output import WHOLE_NUMBERS
from ..t3.vae.plan import make_plan
from ..t3.vae.structure import Structure, read_structure
from .families import FAMILIES

# Room is made on the device for tiles that cost this much more than the best; larger ones are not worth another
# model's place.
_GOOD_ENOUGH = 1.1
_PREVIEW_PIXELS, _PREVIEW_SECONDS = 512, 2.0
log = logging.getLogger("T3")


@dataclass
class Decode:
    """One decode that is possible: latents `[B, C, T, H, W]` for this VAE. `told`: what the user should know of it."""

    vae: Any
    latents: torch.Tensor
    structure: Structure
    told: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, vae: Any, samples: dict[str, Any]) -> Decode:
        """Raises T3Error for another family's VAE, or latents that are not for this one."""
        structure = _structure(vae)
        latents = samples["samples"]
        if getattr(latents, "is_nested", False):  # video and sound in one; the video comes first
            latents = latents.unbind()[0]
        shape = " x ".join(map(str, latents.shape))
        if latents.ndim != 5 or not all(latents.shape):
            raise T3Error(
                f"these latents have the shape {shape}; video latents are batch x channels x frames x height x width. "
                "Use latents of T3 Empty Latent or of a Wan model, not those of an image model."
            )
        if latents.shape[1] != structure.latent_channels:
            families = {family.channels: family.name for family in FAMILIES.values()}
            channels = latents.shape[1]
            whose = f" These are latents of {families[channels]}." if channels in families else ""
            raise T3Error(
                f"these latents have {channels} channels, and this {structure.generation} VAE decodes "
                f"{structure.latent_channels}.{whose} Load the VAE of the model that made them: the Wan2.1 VAE for 16 "
                "channels, the Wan2.2 VAE for 48."
            )
        return cls(vae, latents, structure)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`[B, frames, H, W, 3]` of what comes out."""
        batch, _, frames, height, width = self.latents.shape
        scale = self.structure.scale
        return batch, self.structure.frames(frames), height * scale, width * scale, 3

    def into(self, out: torch.Tensor, tile: int = 0) -> str:
        """Decode into `out`, shaped as `shape`. tile: pixels, 0 for what fits the free memory.

        Returns how it went, in words. Raises T3Error for latents with NaN, a tile or a picture that does not fit, and
        what ComfyUI raises when the user cancels; then some of `out` is not decoded.
        """
        device, dtype = self.vae.device, self.vae.vae_dtype
        began = time.perf_counter()
        with comfy.model_management.cuda_device_context(device):
            state = self.vae.first_stage_model.state_dict()
            self._make_room(device, state, dtype, tile)
            # Made anew each time, as ComfyUI moves a VAE to the card each time: nothing stays twice in memory.
            decoder = WanDecoder.from_state_dict(state, device, dtype)
            del state
            memory = self._memory(device, out)
            size = self._tile(device, dtype, memory, tile)
            progress = _progress(out)
            decode_frames(decoder, self.latents, memory=memory, tile=size, out=out, progress=progress, say=self._say)
        count = -(-out.shape[2] // size[0]) * -(-out.shape[3] // size[1])
        tiles = f"{count} tile{'s' if count > 1 else ''} of at most {size[1]} x {size[0]} pixels"
        return "\n".join([f"{tiles}, {time.perf_counter() - began:,.1f} s, {dtype} on {device}", *self.told])

    def _say(self, message: str) -> None:
        """Something the user should know: in the log at once, and in the report."""
        self.told.append(message)
        log.warning("T3 VAE %s", message)

    def _tile(self, device: torch.device, dtype: torch.dtype, memory: int, tile: int) -> tuple[int, int]:
        """Height and width of the tiles, in pixels. Raises T3Error if the memory is too little for them."""
        _, _, frames, height, width = self.latents.shape
        try:
            plan = make_plan(self.structure, (frames, height, width), device, dtype.itemsize, memory, tile or None)
        except T3Error as error:
            raise T3Error(f"there is too little free memory on {device} for this decode: {error}") from error
        rows, cols = plan.tile
        return rows * self.structure.scale, cols * self.structure.scale

    def _make_room(self, device: torch.device, state: dict[str, torch.Tensor], dtype: torch.dtype, tile: int) -> None:
        """Have ComfyUI take other models off the device if less is free than good tiles need, and only then."""
        if device.type == "cpu":
            return
        _, _, frames, height, width = self.latents.shape
        sizes = self.structure, height, width
        if tile:
            latents = max(1, tile // self.structure.scale)
            tile_bytes = weigh(*sizes, (latents, latents), dtype.itemsize).bytes
        else:
            found = choices(*sizes, dtype.itemsize)
            tile_bytes = min(choice.bytes for choice in found if choice.work <= _GOOD_ENOUGH * found[0].work)
        kept = kept_bytes(self.structure, frames, height, width, dtype.itemsize)
        weights = sum(value.numel() for key, value in state.items() if not key.startswith("encoder."))
        work = tile_bytes + middle_bytes(*sizes, dtype.itemsize) + kept
        wanted = weights * dtype.itemsize + free_needed(work, device) + comfy.model_management.extra_reserved_memory()
        if comfy.model_management.get_free_memory(device) < wanted:
            comfy.model_management.free_memory(wanted, device)

    @staticmethod
    def _memory(device: torch.device, out: torch.Tensor) -> int:
        """Bytes the decode may take: as the decoder sees it, and as ComfyUI does with its reserve for others."""
        free = comfy.model_management.get_free_memory(device)
        if device.type == "cpu":
            # What `out` will take is not taken before it is written to.
            return max(0, min(free_bytes(device), int(free - out.numel() * out.element_size()) // 2))
        return max(0, min(free_bytes(device), int(free - comfy.model_management.extra_reserved_memory())))


def _structure(vae: Any) -> Structure:
    model = getattr(vae, "first_stage_model", None)
    if model is None:
        raise T3Error("this VAE is empty: the checkpoint it comes from has none. Load the Wan VAE with Load VAE.")
    try:
        structure = read_structure({name: tuple(value.shape) for name, value in model.state_dict().items()})
    except T3Error as error:
        raise T3Error(
            f"the VAE ({type(model).__name__}) is not one of Wan's: connect the Wan2.1 or Wan2.2 VAE, or decode with "
            f"ComfyUI's VAE Decode. ({error})"
        ) from None
    if structure.patch > 1 and structure.generation == "Wan2.1":
        raise T3Error(
            f"this Wan2.1 VAE gives {3 * structure.patch**2} channels, not 3: it is made for a node of its own. Use "
            "that node, or load the plain Wan2.1 VAE."
        )
    return structure


def _progress(out: torch.Tensor) -> Callable[[int, int], None]:
    """What `decode_frames` calls after every frame of a tile: looks for Cancel, moves the bar, shows what is there."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    bar = comfy.utils.ProgressBar(1)
    wanted = args.preview_method != LatentPreviewMethod.NoPreviews
    shown = time.perf_counter()
    out[:, 0].zero_()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if wanted and bar.hook is not None and time.perf_counter() - shown > _PREVIEW_SECONDS:
            preview = ("JPEG", small_picture(out[0, 0]), latent_preview.MAX_PREVIEW_RESOLUTION)
            shown = time.perf_counter()
        bar.update_absolute(done, total, preview)

    return progress


def small_picture(frame: torch.Tensor):
    """A frame `[H, W, 3]` of any dtype `decode_frames` writes, as a PIL image: every so many-th pixel of it."""
    from PIL import Image

    step = max(1, -(-max(frame.shape[:2]) // _PREVIEW_PIXELS))
    values = frame[::step, ::step].to("cpu", torch.float32) * (255 / WHOLE_NUMBERS.get(frame.dtype, 1))
    return Image.fromarray(values.to(torch.uint8).numpy())
