"""Decoded frames to the pixels of a buffer: 8 or 16 bits, or floats in [0, 1]."""

from __future__ import annotations

from collections import deque

import torch

from ..errors import T3Error

WHOLE_NUMBERS = {torch.uint8: 255, torch.uint16: 65535}
# Frames that may be on their way to main memory.
_STAGED = 2
DTYPES = (*WHOLE_NUMBERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_out(out: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise T3Error unless frames of this shape can be written into `out`."""
    if tuple(out.shape) != shape:
        raise T3Error(f"out has shape {tuple(out.shape)}; these latents decode to {shape}: [B, frames, H, W, 3].")
    if out.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise T3Error(f"out has dtype {out.dtype}; frames are written as {names}.")


class Outlet:
    """Where the frames of a tile go, in order. A GPU computes the next one while the last are copied to main memory."""

    def __init__(self, target: torch.Tensor, device: torch.device) -> None:
        """target: `[frames, h, w, 3]` of the dtypes above, on any device. device: of the frames."""
        self._target, self._count = target, 0
        self._sum: torch.Tensor | None = None
        self._staged: deque[tuple[int, torch.Tensor, torch.cuda.Event]] = deque()
        self._free: list[torch.Tensor] = []
        self._staging = device.type == "cuda" and target.device.type == "cpu"
        if self._staging:
            size = target.shape[1:]
            self._free = [torch.empty(size, dtype=target.dtype, pin_memory=True) for _ in range(_STAGED)]

    def put(self, frame: torch.Tensor) -> None:
        """The next frame, `[3, h, w]` in [-1, 1] and beyond."""
        floats, self._dtype = as_floats(frame), frame.dtype
        total = floats.sum()
        self._sum = total if self._sum is None else self._sum + total
        pixels = as_dtype(floats, self._target.dtype)
        number, self._count = self._count, self._count + 1
        if not self._staging:
            self._write(number, pixels)
            return
        if not self._free:
            self._land()
        room = self._free.pop().copy_(pixels, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._staged.append((number, room, event))

    def finish(self) -> None:
        """All frames are in the target after this. Raises T3Error if there was a NaN among them."""
        while self._staged:
            self._land()
        # Between 0 and 1, the sum is a number if every value is one, and costs a tenth of looking at each.
        if self._sum is not None and torch.isnan(self._sum):
            raise T3Error(
                f"decoding in {self._dtype} gave NaN, which is no picture. float16 overflows with some weights: decode "
                "in bfloat16 or float32. If it was not float16, the VAE's weights are damaged."
            )

    def _land(self) -> None:
        number, room, event = self._staged.popleft()
        event.synchronize()
        self._write(number, room)
        self._free.append(room)

    def _write(self, number: int, pixels: torch.Tensor) -> None:
        """Frame `number`, `[h, w, 3]` in the target's dtype, to its place."""
        self._target[number].copy_(pixels)


def as_floats(frame: torch.Tensor) -> torch.Tensor:
    """`[3, h, w]` in [-1, 1] and beyond to `[h, w, 3]` in [0, 1], in float32 (float64 from float64)."""
    wide = torch.float64 if frame.dtype == torch.float64 else torch.float32
    return frame.permute(1, 2, 0).to(wide, memory_format=torch.contiguous_format).add(1).div_(2).clamp_(0, 1)


def as_dtype(floats: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in [0, 1] as they are, or as whole numbers from 0, rounded to nearest. Uses `floats` up."""
    if dtype not in WHOLE_NUMBERS:
        return floats.to(dtype)
    x = floats.mul_(WHOLE_NUMBERS[dtype]).round_()
    # torch converts few types to uint16, and not on every device; the low 16 bits of an int32 are the same.
    return x.to(torch.uint8) if dtype == torch.uint8 else x.to(torch.int32).to(torch.int16).view(torch.uint16)
