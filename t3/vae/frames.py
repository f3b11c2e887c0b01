"""Frames as a caller gives them to an encode: checked, and turned into what the encoder takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import T3Error
from .down_structure import DownStructure
from .output import DTYPES, WHOLE_NUMBERS

# Resizing with a sharp filter goes a little beyond [0, 1]; frames in [-1, 1] or 0 to 255 go far beyond.
_BEYOND = 0.25
# A filter does that to few pixels. More of them this far below black are told: it may be a clip in [-1, 1] that is
# nowhere dark. One that stays above mid-grey looks like frames in [0, 1], and nothing can tell.
_BELOW, _FEW = 0.02, 0.05


def check_frames(frames: torch.Tensor, structure: DownStructure, say: Callable[[str], object]) -> None:
    """Raise T3Error unless `frames` can be encoded: `[B, frames, H, W, 3]` in [0, 1], of a legal size.

    Looks at every pixel once, one frame at a time. `say` is told of frames that can be encoded and are suspect.
    """
    shape = tuple(frames.shape)
    if frames.ndim != 5:
        hint = " For one clip, give frames[None]; for a batch of pictures, frames[:, None]." if len(shape) == 4 else ""
        raise T3Error(f"frames have shape {shape}; a clip is [B, frames, H, W, 3].{hint}")
    if shape[-1] != 3:
        hint = "Give [B, frames, H, W, 3], red, green and blue last"
        if shape[-1] == 4:
            hint = "Give RGB without alpha: frames[..., :3]"
        elif shape[1] == 3:
            hint = "They look like [B, 3, frames, H, W]: give frames.permute(0, 2, 3, 4, 1)"
        elif shape[2] == 3:
            hint = "They look like [B, frames, 3, H, W]: give frames.permute(0, 1, 3, 4, 2)"
        raise T3Error(f"frames have shape {shape}, so {shape[-1]} channels. {hint}.")
    if not all(shape):
        raise T3Error(f"frames have shape {shape}: there is nothing in them to encode.")
    _check_size(shape, structure)
    if frames.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise T3Error(f"frames have dtype {frames.dtype}; frames are read as {names}.")
    if frames.is_floating_point():
        _check_values(frames, say)


def as_input(pixels: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`[h, w, 3]` in [0, 1], or whole numbers from 0, to `[1, 3, h, w]` in [-1, 1] on the encoder's device.

    The sums are made in float32 (float64 for float64), before the dtype asked for.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    most = WHOLE_NUMBERS.get(pixels.dtype, 1)
    if pixels.dtype == torch.uint16:
        # Not every device converts uint16; int16 holds the same bits.
        x = pixels.contiguous().view(torch.int16).to(device).to(torch.int32).bitwise_and_(0xFFFF).to(wide)
    else:
        x = pixels.to(device).to(wide, copy=True)
    x = x.div_(most) if most > 1 else x
    return x.mul_(2).sub_(1).permute(2, 0, 1)[None].to(dtype, memory_format=torch.contiguous_format)


def _check_size(shape: tuple[int, ...], structure: DownStructure) -> None:
    frames, height, width = shape[1:4]
    scale, step = structure.scale, structure.step
    if height % scale or width % scale:
        nearest = [max(scale, (size + scale // 2) // scale * scale) for size in (width, height)]
        raise T3Error(
            f"frames are {width} x {height} pixels; this {structure.generation} VAE encodes multiples of {scale}. "
            f"Resize or crop to {nearest[0]} x {nearest[1]}."
        )
    if (frames - 1) % step:
        fewer = 1 + (frames - 1) // step * step
        near = (fewer, fewer + step) if frames - fewer <= step // 2 else (fewer + step, fewer)
        raise T3Error(
            f"there are {frames} frames; this VAE encodes {step} n + 1. Give {near[0]} or {near[1]} frames: leave some "
            "out or repeat the last."
        )


def _check_values(frames: torch.Tensor, say: Callable[[str], object]) -> None:
    shape = frames.shape
    low, high, below = float("inf"), float("-inf"), 0
    for clip in range(shape[0]):
        for number in range(shape[1]):
            least, most = (float(value) for value in frames[clip, number].aminmax())
            if not (abs(least) < float("inf") and abs(most) < float("inf")):  # also when they are NaN
                where = f"frame {number}" + (f" of clip {clip}" if shape[0] > 1 else "")
                raise T3Error(f"frames hold NaN or infinity in {where}, so there is no picture to encode.")
            low, high = min(low, least), max(high, most)
            if least < -_BELOW:
                below += int((frames[clip, number] < -_BELOW).sum())
    if low < -_BEYOND or high > 1 + _BEYOND:
        hint = "Scale them first"
        if high > 1 + _BEYOND and low >= -_BEYOND:
            hint = "If they are 0 to 255, give them as uint8, or divide by 255"
        elif low >= -1 - _BEYOND and high <= 1 + _BEYOND:
            hint = "If they are in [-1, 1], give (frames + 1) / 2"
        raise T3Error(f"frames reach from {low:g} to {high:g}; floats are taken as [0, 1]. {hint}.")
    if below > _FEW * frames.numel():
        say(
            f"encode: {100 * below / frames.numel():.0f} % of the frames' values are below black, down to {low:.2g}. "
            "They are taken as [0, 1] all the same; if they are in [-1, 1], give (frames + 1) / 2."
        )
