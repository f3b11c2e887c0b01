"""The layers that only Wan's video encoders have, one frame at a time; the others are those of `t3.vae.layers`.

Where time is halved, a frame goes in and none comes out until its partner has come: layers then return None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .down_structure import DownLevel, Downsample
from .down_tiles import beyond, doubled
from .layers import Conv, ResidualBlock, State, run_blocks
from .past import Past
from .sums import Sum
from .tiles import Window


class DownPast(Past):
    """The feature cache of an encoder: also the frames that wait for the rest of their pair."""

    def __init__(self, frames: int | None = None) -> None:
        super().__init__(frames)
        self._waiting: dict[nn.Module, list[torch.Tensor]] = {}

    def pair(self, layer: nn.Module, frame: torch.Tensor, keep: int) -> list[torch.Tensor] | None:
        """The clip's first frame alone; then, at every second frame, both and the `keep` before them; else None."""
        frames = self._waiting.get(layer)
        if frames is None:
            self._waiting[layer] = [frame][:keep]
            return [frame]
        frames.append(frame)
        if len(frames) < keep + 2:
            return None
        self._waiting[layer] = frames[2:]
        return frames


class Downsampling(nn.Module):
    """A convolution of stride 2. In time: one frame for two, but one for the clip's first."""

    def __init__(self, state: State, shape: Downsample) -> None:
        super().__init__()
        self.kernel, self.overlap = shape.kernel, shape.depth - 2
        self.conv = Conv(state, f"{shape.name}.resample.1")
        self.time_conv = Conv(state, f"{shape.name}.time_conv") if shape.temporal else None

    def forward(self, x: Sum, past: DownPast, need: Window) -> Sum | None:
        """Gives `need`, at half the size of `x`."""
        seen = Window(doubled(need.rows, self.kernel), doubled(need.cols, self.kernel))
        frame = x.value()[seen.inside(x.window)]
        # Zeros only at the right and the bottom, and only at the picture's own edge. `conv2d` would pad both ends.
        right, bottom = beyond(need.cols, self.kernel), beyond(need.rows, self.kernel)
        if right or bottom:
            frame = F.pad(frame, (0, right, 0, bottom))
        y = Sum(F.conv2d(frame, self.conv.weight, None, stride=2), need, self.conv.bias)
        if self.time_conv is None:
            return y
        del frame
        frames = past.pair(self, y.value(), self.overlap)
        if frames is None:
            return None
        # The first frame goes by: the time convolution does not see it until it makes one of the next two.
        return y if len(frames) == 1 else Sum(self.time_conv.pointwise(torch.cat(frames, dim=1)), need)


class MeanShortcut(nn.Module):
    """Wan2.2's path around a level: the mean of the channels, pixels and frames that become one channel of a pixel."""

    def __init__(self, shape: DownLevel) -> None:
        super().__init__()
        self.out = shape.blocks[-1].out
        self.halves = shape.downsample is not None
        self.temporal = shape.downsample is not None and shape.downsample.temporal

    def forward(self, frame: Sum, past: DownPast, need: Window) -> torch.Tensor | None:
        """Gives `need`, at half the size of `frame` if the level halves."""
        x = frame.value()[(need.scaled(2) if self.halves else need).inside(frame.window)]
        if self.halves:
            x = F.pixel_unshuffle(x, 2)  # channel, row, column
        if self.temporal:
            frames = past.pair(self, x, 0)
            if frames is None:
                return None
            # The clip's first frame is the later of a pair whose earlier is zeros.
            earlier, later = frames if len(frames) == 2 else (torch.zeros_like(x), x)
            pixels = [frame.unflatten(1, (-1, 4)) for frame in (earlier, later)]
            x = torch.stack(pixels, dim=2).flatten(1, 3)  # channel, frame, row, column
        return x.unflatten(1, (self.out, -1)).mean(dim=2)


class DownStage(nn.Module):
    """One level of the encoder: residual blocks, downsampling, and Wan2.2's shortcut around both."""

    def __init__(self, state: State, shape: DownLevel, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(state, block.name) for block in shape.blocks)
        self.downsampling = Downsampling(state, shape.downsample) if shape.downsample else None
        self.shortcut = MeanShortcut(shape) if residual else None

    def forward(self, x: Sum, past: DownPast, windows: tuple[Window, ...], need: Window) -> Sum | None:
        """What `x` becomes if its time has come: `x` holds windows[0], each block gives the next, the last `need`."""
        y: Sum | None = run_blocks(self.blocks, x, past, windows, keep=self.shortcut is not None)
        if self.downsampling is not None:
            y = self.downsampling(y, past, need)
        if self.shortcut is None:
            return y
        around = self.shortcut(x, past, need)
        # The value of `y` may be kept for the next frames: it is the one that is only read.
        return None if y is None or around is None else Sum(around, need, by=y.value())
