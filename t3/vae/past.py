"""The feature cache: for each causal convolution, the frames it looks at, side by side where it reads them."""

from __future__ import annotations

import torch
from torch import nn

from .sums import layout

# A frame's rows move to a new layout in so many steps.
_STEPS = 16


class Past:
    """What a clip's earlier frames leave for the later ones.

    The frames a convolution looks at lie in one buffer, side by side in its channels. A new frame takes the place of
    the oldest, so nothing is moved: they are in order but for where it begins, and the weights are turned to match.
    """

    def __init__(self, frames: int | None = None) -> None:
        """frames: of the clip, if no more than these will come; saves room in those of one or two."""
        self._frames = frames
        self._buffers: dict[nn.Module, torch.Tensor] = {}
        self._seen: dict[nn.Module, int] = {}

    def place(self, layer: nn.Module, depth: int, like) -> torch.Tensor:
        """Where to write the next frame for `layer`, which looks at `depth` frames.

        like: has the shape `[B, C, h, w]`, dtype and device of the frame.
        """
        batch, channels, height, width = like.shape
        seen = self._seen.get(layer, 0)
        if seen == 0:
            most = depth if self._frames is None else min(depth, self._frames)
            size = most * batch * channels * height * width
            self._buffers[layer] = torch.empty(size, dtype=like.dtype, device=like.device)
        now = min(seen + 1, depth)
        frames = self._view(layer, (batch, now * channels, height, width))
        if 0 < seen < depth:
            self._move(self._view(layer, (batch, seen * channels, height, width)), frames)
        self._seen[layer] = seen + 1
        slot = seen % depth
        return frames[:, slot * channels : (slot + 1) * channels]

    def frames(self, layer: nn.Module, depth: int, like) -> tuple[torch.Tensor, int, int]:
        """What `layer` looks at: the frames side by side; how many they are; which of them is the newest."""
        batch, channels, height, width = like.shape
        seen = self._seen[layer]
        now = min(seen, depth)
        return self._view(layer, (batch, now * channels, height, width)), now, (seen - 1) % depth

    @staticmethod
    def _move(before: torch.Tensor, after: torch.Tensor) -> None:
        """Frames to a layout with room for one more, in the same buffer. The last rows first: what is not yet moved is
        not written over then, and only some rows are held twice at a time."""
        height = before.shape[2]
        rows = -(-height // _STEPS) if before.shape[0] == 1 else height
        for bottom in range(height, 0, -rows):
            some = slice(max(0, bottom - rows), bottom)
            after[:, : before.shape[1], some] = before[:, :, some].clone()

    def first_time(self, layer: nn.Module) -> bool:
        """Whether `layer` asks this for the first time."""
        if layer in self._seen:
            return False
        self._seen[layer] = 0
        return True

    def _view(self, layer: nn.Module, shape: tuple[int, int, int, int]) -> torch.Tensor:
        batch, channels, height, width = shape
        numbers = self._buffers[layer][: batch * channels * height * width]
        if layout(numbers.device) == torch.channels_last:
            return numbers.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return numbers.view(shape)
