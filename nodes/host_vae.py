"""Work on ComfyUI's loaded VAE, decode or encode: room on its device, tiles, progress, cancel and previews."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import comfy.model_management
import comfy.utils
import torch

from ..t3.errors import T3Error
from ..t3.vae.choice import Choice
from ..t3.vae.memory import free_bytes, free_needed
from ..t3.vae.output import WHOLE_NUMBERS
from ..t3.vae.plan import Plan

_PREVIEW_PIXELS, _PREVIEW_SECONDS = 512, 2.0
log = logging.getLogger("T3")


@dataclass
class Work:
    """What a decode (`host_decode`) and an encode (`host_encode`) have in common.

    structure: of the VAE's decoder or encoder. told: what the user should know of the work.
    """

    vae: Any
    structure: Any
    told: list[str] = field(default_factory=list, kw_only=True)
    name: ClassVar[str]
    coder: ClassVar[Any]
    unused: ClassVar[str]  # weights that this work does not load
    # Room is made on the device for tiles that cost this much more than the best; larger ones are not worth another
    # model's place.
    good_enough: ClassVar[float]

    @property
    def size(self) -> tuple[int, int, int]:
        """T, H and W of the latents."""
        raise NotImplementedError

    def _choices(self, itemsize: int, tile: tuple[int, int] | None) -> Sequence[Choice]:
        """What tiles of so many latents take; every sensible size if None, the cheapest first."""
        raise NotImplementedError

    def _beside(self, itemsize: int) -> int:
        """Bytes on the device that are not a tile's: the middle stage, and what waits between it and the tiles."""
        raise NotImplementedError

    def _plan(self, device: torch.device, itemsize: int, memory: int, tile: int | None) -> Plan:
        raise NotImplementedError

    def run(self, tile: int, result: int, work: Callable[[Any, int, tuple[int, int]], Any]) -> tuple[Any, str]:
        """Load the weights, choose tiles and call `work` with the decoder or encoder, the memory it may take and the
        tiles' height and width in pixels. tile: pixels, 0 for what fits. result: bytes that what comes out will take.

        Returns what `work` does, and how it went, in words.
        """
        device, dtype = self.vae.device, self.vae.vae_dtype
        began = time.perf_counter()
        with comfy.model_management.cuda_device_context(device):
            state = self.vae.first_stage_model.state_dict()
            self._make_room(device, state, dtype, tile)
            # Made anew each time, as ComfyUI moves a VAE to the card each time: nothing stays twice in memory.
            coder = self.coder.from_state_dict(state, device, dtype)
            del state
            memory = self._memory(device, result)
            rows, cols = self._tile(device, dtype, memory, tile)
            found = work(coder, memory, (rows, cols))
        _, height, width = self.size
        scale = self.structure.scale
        count = -(-height * scale // rows) * -(-width * scale // cols)
        tiles = f"{count} tile{'s' if count > 1 else ''} of at most {cols} x {rows} pixels"
        return found, "\n".join([f"{tiles}, {time.perf_counter() - began:,.1f} s, {dtype} on {device}", *self.told])

    def say(self, message: str) -> None:
        """Something the user should know: in the log at once, and in the report."""
        self.told.append(message)
        log.warning("T3 VAE %s", message)

    def _tile(self, device: torch.device, dtype: torch.dtype, memory: int, tile: int) -> tuple[int, int]:
        """Height and width of the tiles, in pixels. Raises T3Error if the memory is too little for them."""
        try:
            plan = self._plan(device, dtype.itemsize, memory, tile or None)
        except T3Error as error:
            raise T3Error(f"there is too little free memory on {device} for this {self.name}: {error}") from error
        rows, cols = plan.tile
        return rows * self.structure.scale, cols * self.structure.scale

    def _make_room(self, device: torch.device, state: dict[str, torch.Tensor], dtype: torch.dtype, tile: int) -> None:
        """Have ComfyUI take other models off the device if less is free than good tiles need, and only then."""
        if device.type == "cpu":
            return
        latents = max(1, tile // self.structure.scale)
        found = self._choices(dtype.itemsize, (latents, latents) if tile else None)
        tile_bytes = min(choice.bytes for choice in found if choice.work <= self.good_enough * found[0].work)
        weights = sum(value.numel() for key, value in state.items() if not key.startswith(self.unused))
        wanted = weights * dtype.itemsize + free_needed(tile_bytes + self._beside(dtype.itemsize), device)
        wanted += comfy.model_management.extra_reserved_memory()
        if comfy.model_management.get_free_memory(device) < wanted:
            comfy.model_management.free_memory(wanted, device)

    @staticmethod
    def _memory(device: torch.device, result: int) -> int:
        """Bytes the work may take: as the decoder sees it, and as ComfyUI does with its reserve for others.

        result: bytes that are counted as free, and which what comes out will take.
        """
        free = comfy.model_management.get_free_memory(device)
        if device.type == "cpu":
            return max(0, min(free_bytes(device), int(free - result) // 2))
        return max(0, min(free_bytes(device), int(free - comfy.model_management.extra_reserved_memory())))


def read_vae(vae: Any, read: Callable[[dict[str, tuple[int, ...]]], Any], instead: str) -> Any:
    """The structure that `read` finds in ComfyUI's VAE. Raises T3Error, with what to do `instead`."""
    model = getattr(vae, "first_stage_model", None)
    if model is None:
        raise T3Error("this VAE is empty: the checkpoint it comes from has none. Load the Wan VAE with Load VAE.")
    try:
        return read({name: tuple(value.shape) for name, value in model.state_dict().items()})
    except T3Error as error:
        raise T3Error(
            f"the VAE ({type(model).__name__}) is not one of Wan's: connect the Wan2.1 or Wan2.2 VAE, or {instead}. "
            f"({error})"
        ) from None


def progress_of(picture: torch.Tensor | None = None) -> Callable[[int, int], None]:
    """What is called after every frame of a tile: looks for Cancel, moves the bar, shows what there is of `picture`."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    bar = comfy.utils.ProgressBar(1)
    if args.preview_method == LatentPreviewMethod.NoPreviews:
        picture = None
    shown = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if picture is not None and bar.hook is not None and time.perf_counter() - shown > _PREVIEW_SECONDS:
            preview = ("JPEG", small_picture(picture), latent_preview.MAX_PREVIEW_RESOLUTION)
            shown = time.perf_counter()
        bar.update_absolute(done, total, preview)

    return progress


def small_picture(frame: torch.Tensor):
    """A frame `[H, W, 3]` of any dtype `decode_frames` writes, as a PIL image: every so many-th pixel of it."""
    from PIL import Image

    step = max(1, -(-max(frame.shape[:2]) // _PREVIEW_PIXELS))
    values = frame[::step, ::step].to("cpu", torch.float32) * (255 / WHOLE_NUMBERS.get(frame.dtype, 1))
    return Image.fromarray(values.to(torch.uint8).numpy())
