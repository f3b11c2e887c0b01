"""Decoded frames to the pixels of a buffer: 8 or 16 bits, or floats in [0, 1]."""

from __future__ import annotations

import torch

from ..errors import T3Error

WHOLE_NUMBERS = {torch.uint8: 255, torch.uint16: 65535}
DTYPES = (*WHOLE_NUMBERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_out(out: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise T3Error unless frames of this shape can be written into `out`."""
    if tuple(out.shape) != shape:
        raise T3Error(f"out has shape {tuple(out.shape)}; these latents decode to {shape}: [B, frames, H, W, 3].")
    if out.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise T3Error(f"out has dtype {out.dtype}; frames are written as {names}.")


def as_pixels(frame: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[3, h, w]` in [-1, 1] and beyond to `[h, w, 3]`: floats in [0, 1], or whole numbers from 0, rounded to nearest.

    The sums are made in float32 (float64 from float64), before the dtype asked for. Raises T3Error for NaN.
    """
    wide = torch.float64 if frame.dtype == torch.float64 else torch.float32
    x = frame.permute(1, 2, 0).to(wide, memory_format=torch.contiguous_format).add(1).div_(2).clamp_(0, 1)
    # Between 0 and 1, the sum is a number if every value is one, and costs a tenth of looking at each.
    if torch.isnan(x.sum()):
        raise T3Error(
            f"decoding in {frame.dtype} gave NaN, which is no picture. float16 overflows with some weights: decode in "
            "bfloat16 or float32. If it was not float16, the VAE's weights are damaged."
        )
    if dtype not in WHOLE_NUMBERS:
        return x.to(dtype)
    x = x.mul_(WHOLE_NUMBERS[dtype]).round_()
    # torch converts few types to uint16, and not on every device; the low 16 bits of an int32 are the same.
    return x.to(torch.uint8) if dtype == torch.uint8 else x.to(torch.int32).to(torch.int16).view(torch.uint16)
