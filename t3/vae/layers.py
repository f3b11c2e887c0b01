"""The layers of Wan's video decoders, one frame at a time.

A causal convolution over time is a 2-D convolution over the channels of the last frames, side by side: the same sum,
and the form that runs fastest (with channels last). Every layer takes the window of the picture its input holds and
the window its result shall hold (`t3.vae.tiles`), so that a tile computes what it needs and no more. Layers pass on
sums that are not yet added up (`t3.vae.sums`): the next one does that in the same pass as its norm.
Frames are `[B, C, h, w]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.conv_sum.naive import Doubled
from .attend import attend
from .past import Past
from .structure import Level, Upsample
from .sums import Sum, layout
from .tiles import Window, padding

State = Mapping[str, torch.Tensor]


class Conv(nn.Module):
    """A convolution over height, width and past frames; before the first frame there is nothing, that is, zeros."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__()
        weight = state[f"{name}.weight"]
        self.depth = weight.shape[2] if weight.ndim == 5 else 1
        if weight.ndim == 5:
            weight = weight.transpose(1, 2).flatten(1, 2)
        self.radius = weight.shape[-1] // 2
        self.weight = _parameter(weight.contiguous(memory_format=layout(weight.device)))
        self.bias = _parameter(state[f"{name}.bias"])

    def forward(self, x: Sum, past: Past, need: Window, norm: Norm | None = None, keep: bool = False) -> Sum:
        """The convolution of `x`, or of its norm, and the frames before it; gives `need`.

        keep: whether the value of `x` is wanted after that.
        """
        frames, weight = self._frames(x, past, norm, keep)
        have = x.window
        rows, cols = (padding(span, self.radius) for span in (have.rows, have.cols))
        y = F.conv2d(frames, weight, None, padding=(rows, cols))
        top = need.rows.start - have.rows.start - self.radius + rows
        left = need.cols.start - have.cols.start - self.radius + cols
        return Sum(y[..., top:, left:], need, self.bias)

    def in_time(self, x: Sum, past: Past, parts: int) -> list[torch.Tensor]:
        """As `forward`, for a convolution over time alone: its channels in so many tensors."""
        frames, weight = self._frames(x, past)
        pairs = zip(weight.chunk(parts), self.bias.chunk(parts), strict=True)
        return [pointwise(frames, some, its_bias) for some, its_bias in pairs]

    def pointwise(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution where it is one of single pixels."""
        return pointwise(x, self.weight, self.bias)

    def _frames(
        self, x: Sum, past: Past, norm: Norm | None = None, keep: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The frames it looks at, `x` or its norm the newest, and the weight with its parts in the frames' order."""
        place = past.place(self, self.depth, x)
        if norm is None:
            x.write(place)
        else:
            norm(x, place, keep)
        frames, count, newest = past.frames(self, self.depth, x)
        each = self.weight.shape[1] // self.depth
        weight = self.weight[:, (self.depth - count) * each :]
        first = (count - 1 - newest) * each
        if first:
            weight = torch.cat((weight[:, first:], weight[:, :first]), dim=1)
        return frames, weight


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A convolution of single pixels; where channels are last, as the matrix product that it is, bias included."""
    if x.device.type == "cuda" and x.permute(0, 2, 3, 1).is_contiguous():
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


class Norm(nn.Module):
    """RMS norm over the channels of each pixel, times gamma; with `silu`, that activation after it."""

    def __init__(self, state: State, name: str, silu: bool = True) -> None:
        super().__init__()
        self.gamma = _parameter(state[f"{name}.gamma"].flatten())
        self.silu = silu

    def forward(self, x: Sum, place: torch.Tensor, keep: bool = False) -> None:
        """Write the norm of `x` to `place`. keep: whether the value of `x` is wanted after that."""
        x.write_normed(place, self.gamma, self.silu, keep)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus the input."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(state, f"{name}.residual.0"), Conv(state, f"{name}.residual.2")
        self.norm2, self.conv2 = Norm(state, f"{name}.residual.3"), Conv(state, f"{name}.residual.6")
        self.shortcut = Conv(state, f"{name}.shortcut") if f"{name}.shortcut.weight" in state else None

    def forward(self, x: Sum, past: Past, need: Window) -> Sum:
        y = self.conv1(x, past, need.grown(self.conv2.radius), self.norm1, keep=True)
        y = self.conv2(y, past, need, self.norm2)
        by = x.value() if self.shortcut is None else self.shortcut.pointwise(x.value())
        return y.plus(by[need.inside(x.window)])


class Attention(nn.Module):
    """Attention of every pixel of a frame to every other, one head, plus the input."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__()
        self.norm = Norm(state, f"{name}.norm", silu=False)
        self.to_qkv, self.proj = Conv(state, f"{name}.to_qkv"), Conv(state, f"{name}.proj")

    def forward(self, x: Sum, memory: int | None) -> Sum:
        """x: a whole frame. memory: bytes that scores may take, where there is no attention that keeps none."""
        normed = x.room()
        self.norm(x, normed, keep=True)
        qkv = self.to_qkv.pointwise(normed)
        del normed
        q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, dim=-1)
        attended = attend(q, k, v, memory).transpose(1, 2).unflatten(2, x.shape[2:])
        del qkv, q, k, v
        return Sum(self.proj.pointwise(attended), x.window, by=x.value())


class Upsampling(nn.Module):
    """Every pixel four times, then a convolution. In time: two frames for one, but one for the clip's first."""

    def __init__(self, state: State, shape: Upsample) -> None:
        super().__init__()
        self.weight = _parameter(doubling_weight(state[f"{shape.name}.resample.1.weight"]))
        self.bias = _parameter(state[f"{shape.name}.resample.1.bias"])
        self.time_conv = Conv(state, f"{shape.name}.time_conv") if shape.temporal else None

    def forward(self, x: Sum, past: Past, need: Window) -> list[Sum]:
        # The first frame goes by: the time convolution does not see it, and begins with zeros at the second.
        frames = [x.value()] if self.time_conv is None or past.first_time(self) else self.time_conv.in_time(x, past, 2)
        top, left = need.rows.start // 2 - x.window.rows.start, need.cols.start // 2 - x.window.cols.start
        doubled = Doubled(need.rows.start % 2, need.cols.start % 2)
        found = []
        while frames:
            y = F.conv2d(frames.pop(0), self.weight, None, padding=1)
            found.append(Sum(y[..., top:, left:], need, self.bias, doubled=doubled))
        return found


def doubling_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight `[4 out, in, 2, 2]` that makes of a picture what `weight`, `[out, in, 3, 3]`, makes of it doubled.

    Where every pixel is there four times, the nine that a convolution looks at are four different ones, and weights of
    the same pixel can be added beforehand: 4/9 of the work. See `Doubled` for what comes out.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = _doubling_rows(weight.to(wide))
    parts = [_doubling_rows(part.transpose(2, 3)) for part in rows]
    stacked = torch.cat([part.transpose(2, 3) for pair in parts for part in pair])
    return stacked.to(weight.dtype).contiguous(memory_format=layout(weight.device))


def _doubling_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of weights as two: for a pixel that is the upper of its pair, and for the lower."""
    above, here, below = weight.unbind(2)
    return torch.stack((above, here + below), dim=2), torch.stack((above + here, below), dim=2)


class Shortcut:
    """Wan2.2's path around a level: channels dealt out to the pixels and frames that upsampling makes."""

    def __init__(self, shape: Upsample) -> None:
        self.times = 2 if shape.temporal else 1

    def add_to(self, frames: list[Sum], x: Sum) -> list[Sum]:
        """The frames, at twice the size of `x`, with what of it falls on them."""
        need, have = frames[0].window, x.window
        by = x.value()[..., need.rows.start // 2 - have.rows.start :, need.cols.start // 2 - have.cols.start :]
        # The clip's first frame is one where others are two, and stands for the later of them.
        first = self.times - len(frames)
        return [frame.plus_dealt(by, self.times, first + i) for i, frame in enumerate(frames)]


class UpLevel(nn.Module):
    """One level of the decoder: residual blocks, upsampling, and Wan2.2's shortcut around both."""

    def __init__(self, state: State, shape: Level, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(state, block.name) for block in shape.blocks)
        self.upsampling = Upsampling(state, shape.upsample) if shape.upsample else None
        self.shortcut = Shortcut(shape.upsample) if residual and shape.upsample else None

    def forward(self, x: Sum, past: Past, windows: tuple[Window, ...], need: Window) -> list[Sum]:
        """The frames that `x` becomes: `x` holds windows[0], each block gives the next, the frames hold `need`."""
        y = run_blocks(self.blocks, x, past, windows, keep=self.shortcut is not None)
        if self.upsampling is None:
            return [y]
        frames = self.upsampling(y, past, need)
        return frames if self.shortcut is None else self.shortcut.add_to(frames, x)


def run_blocks(blocks: nn.ModuleList, x: Sum, past: Past, windows: tuple[Window, ...], keep: bool) -> Sum:
    """The blocks of a level, from `x`, which holds windows[0]; each gives the next. keep: whether x is wanted after."""
    y = x
    for block, then in zip(blocks, windows[1:], strict=True):
        result = block(y, past, then)
        if y is not x or not keep:
            y.forget()  # it is a term of the result, to be freed when that is added up
        y = result
    return y


def frames_back(module: nn.Module) -> int:
    """Frames before the newest that its causal convolutions, one after the other, look at."""
    return sum(conv.depth - 1 for conv in module.modules() if isinstance(conv, Conv))


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
