"""From decoded frames to the planes of a picture that an encoder takes."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from .errors import T3Error

KR, KB = 0.2126, 0.0722  # BT.709 luma weights of red and blue


def in_unit_range(frame: torch.Tensor, number: int) -> torch.Tensor:
    """One frame `[H, W, 3]` as new float32 in [0, 1]."""
    levels = {torch.uint8: 255, torch.uint16: 65535}.get(frame.dtype)
    if levels is not None:
        return frame.to(torch.float32).div_(levels)
    if not frame.dtype.is_floating_point:
        raise T3Error(f"Frames of {frame.dtype} have no agreed range. Use uint8, uint16 or a float in [0, 1].")
    values = frame.to(torch.float32, copy=True)
    # The sum is not finite if one value is not, and costs a tenth of looking at each.
    if not torch.isfinite(values.sum()) and (bad := int((~torch.isfinite(values)).sum())):
        raise T3Error(
            f"Frame {number} (counting from 0) holds {bad} values that are NaN or infinite, so the "
            "output is not written. Decode in a wider dtype (bfloat16 or float32), or check the latents."
        )
    return values.clamp_(0, 1)


def yuv420(rgb: torch.Tensor, bit_depth: int) -> list[numpy.ndarray]:
    """RGB `[H, W, 3]` in [0, 1] to limited-range BT.709 planes Y `[H, W]`, Cb and Cr `[H/2, W/2]`, whole float32.

    Done here and not by libswscale: that reads 16-bit white as 65280, up to 3.5 steps off in 10 bits.
    """
    red, green, blue = rgb.unbind(-1)
    luma = (red * KR).add_(green, alpha=1 - KR - KB).add_(blue, alpha=KB)
    scale = 2 ** (bit_depth - 8)
    planes = []
    for colour, weight in ((blue, KB), (red, KR)):
        chroma = (colour - luma).div_(2 * (1 - weight))
        chroma = chroma[0::2].add(chroma[1::2])
        # Samples sit on the left column of each pair, half way down (what players assume of H.264 and H.265).
        even, odd = chroma[:, 0::2], chroma[:, 1::2]
        before = torch.cat((even[:, :1], odd[:, :-1]), dim=1)
        planes.append((even * 2).add_(odd).add_(before).div_(8).mul_(224 * scale).add_(128 * scale))
    planes.insert(0, luma.mul_(219 * scale).add_(16 * scale))
    return [plane.round_().cpu().numpy() for plane in planes]


def fill_plane(plane: Any, values: numpy.ndarray) -> None:
    """Copy `[rows, ...]` into a picture's plane, whose rows are padded."""
    rows = numpy.ascontiguousarray(values).reshape(values.shape[0], -1).view(numpy.uint8)
    target = numpy.frombuffer(plane, numpy.uint8).reshape(-1, plane.line_size)
    target[: rows.shape[0], : rows.shape[1]] = rows
