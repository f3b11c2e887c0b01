"""The layers of Wan's video decoders, one frame at a time.

A causal convolution over time is a 2-D convolution over the channels of the last frames, side by side: the same sum,
and the form that runs fastest (with channels last). Every layer takes the window of the picture its input holds and
the window its result shall hold (`t3.vae.tiles`), so that a tile computes what it needs and no more.
Frames are `[B, C, h, w]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .structure import Level, Upsample
from .tiles import Place, Window

State = Mapping[str, torch.Tensor]


class Past:
    """The feature cache: for each causal convolution, the frames it has seen and will look at again."""

    def __init__(self) -> None:
        self._frames: dict[nn.Module, list[torch.Tensor]] = {}

    def push(self, layer: nn.Module, frame: torch.Tensor, keep: int) -> torch.Tensor:
        """Frames that `layer` sees, oldest first, side by side in the channels; remembers the last `keep`."""
        frames = [*self._frames.get(layer, ()), frame]
        self._frames[layer] = frames[-keep:] if keep else []
        return frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)

    def first_time(self, layer: nn.Module) -> bool:
        """Whether `layer` asks this for the first time."""
        if layer in self._frames:
            return False
        self._frames[layer] = []
        return True


class Conv(nn.Module):
    """A convolution over height, width and past frames; before the first frame there is nothing, that is, zeros."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__()
        weight = state[f"{name}.weight"]
        self.depth = weight.shape[2] if weight.ndim == 5 else 1
        if weight.ndim == 5:
            weight = weight.transpose(1, 2).flatten(1, 2)
        self.radius = weight.shape[-1] // 2
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(state[f"{name}.bias"], requires_grad=False)

    def forward(self, frame: torch.Tensor, past: Past | None, have: Window, need: Window) -> torch.Tensor:
        """`frame` holds `have`; gives `need`. past: may be None where the kernel spans one frame."""
        x = frame if past is None else past.push(self, frame, self.depth - 1)
        weight = self.weight[:, -x.shape[1] :]
        if not self.radius:
            return F.conv2d(x, weight, self.bias)[need.inside(have)]
        # Zeros are padded where the window ends at the picture's edge. `conv2d` pads both ends of an axis alike: what
        # it gets wrong at an inner end is outside `need`, and is cut off.
        rows, cols = (self.radius * (span.start == 0 or span.stop == span.size) for span in (have.rows, have.cols))
        x = F.conv2d(x, weight, self.bias, padding=(rows, cols))
        top = need.rows.start - have.rows.start - self.radius + rows
        left = need.cols.start - have.cols.start - self.radius + cols
        return x[..., top : top + need.rows.length, left : left + need.cols.length]


class Norm(nn.Module):
    """RMS norm over the channels of each pixel, times gamma; with `silu`, that activation after it."""

    def __init__(self, state: State, name: str, silu: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(state[f"{name}.gamma"].flatten(), requires_grad=False)
        self.silu = silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.float32 if x.element_size() < 4 else x.dtype
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        factor = math.sqrt(x.shape[1]) / length.clamp_min_(1e-12)
        x_normed = (x * factor).mul_(self.gamma.to(wide)[:, None, None])
        return (F.silu(x_normed, inplace=True) if self.silu else x_normed).to(x.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus the input."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(state, f"{name}.residual.0"), Conv(state, f"{name}.residual.2")
        self.norm2, self.conv2 = Norm(state, f"{name}.residual.3"), Conv(state, f"{name}.residual.6")
        self.shortcut = Conv(state, f"{name}.shortcut") if f"{name}.shortcut.weight" in state else None

    def forward(self, x: torch.Tensor, past: Past, have: Window, need: Window) -> torch.Tensor:
        middle = need.grown(self.conv2.radius)
        y = self.conv1(self.norm1(x), past, have, middle)
        y = self.conv2(self.norm2(y), past, middle, need)
        x = x[need.inside(have)]
        return y.add_(x if self.shortcut is None else self.shortcut(x, None, need, need))


class Attention(nn.Module):
    """Attention of every pixel of a frame to every other, one head, plus the input."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__()
        self.norm = Norm(state, f"{name}.norm", silu=False)
        self.to_qkv, self.proj = Conv(state, f"{name}.to_qkv"), Conv(state, f"{name}.proj")

    def forward(self, x: torch.Tensor, whole: Window, memory: int | None) -> torch.Tensor:
        """memory: bytes that scores may take, where torch has no attention that keeps none."""
        qkv = self.to_qkv(self.norm(x), None, whole, whole)
        q, k, v = qkv.flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        rows = q.shape[2] if memory is None or keeps_no_scores(q, k, v) else max(1, memory // score_bytes(q))
        parts = [F.scaled_dot_product_attention(some, k, v) for some in q.split(rows, dim=2)]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        y = self.proj(attended[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]), None, whole, whole)
        return y.add_(x)


def keeps_no_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch computes this attention without storing scores, as far as it tells. Slow shapes need no splitting
    then, and splitting would leave a GPU idle."""
    if q.device.type != "cuda":
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(params) or torch.backends.cuda.can_use_efficient_attention(
        params
    )


def score_bytes(q: torch.Tensor) -> int:
    """Bytes of scores per query: the scores, their softmax and a working copy, in float32 at least."""
    return 3 * q.shape[0] * q.shape[2] * max(4, q.element_size())


class Upsampling(nn.Module):
    """Every pixel four times, then a convolution. In time: two frames for one, but one for the clip's first."""

    def __init__(self, state: State, shape: Upsample) -> None:
        super().__init__()
        self.conv = Conv(state, f"{shape.name}.resample.1")
        self.time_conv = Conv(state, f"{shape.name}.time_conv") if shape.temporal else None

    def forward(self, x: torch.Tensor, past: Past, have: Window, need: Window) -> list[torch.Tensor]:
        frames: tuple[torch.Tensor, ...] = (x,)
        # The first frame goes by: the time convolution does not see it, and begins with zeros at the second.
        if self.time_conv is not None and not past.first_time(self):
            frames = self.time_conv(x, past, have, have).chunk(2, dim=1)
        doubled = have.scaled(2)
        return [
            self.conv(F.interpolate(frame, scale_factor=2.0, mode="nearest-exact"), None, doubled, need)
            for frame in frames
        ]


class Shortcut(nn.Module):
    """Wan2.2's path around a level: channels dealt out to the pixels and frames that upsampling makes."""

    channels: torch.Tensor

    def __init__(self, into: int, shape: Upsample) -> None:
        super().__init__()
        times = 2 if shape.temporal else 1
        places = torch.arange(shape.out * times * 4) // (shape.out * times * 4 // into)
        # [frame, row, column] of the pixels made of one: the channels of the input that they hold.
        channels = places.view(shape.out, times, 2, 2).permute(1, 2, 3, 0).contiguous()
        self.register_buffer("channels", channels, persistent=False)

    def add_to(self, frames: list[torch.Tensor], x: torch.Tensor, have: Window, need: Window) -> None:
        """Add what of `x`, which holds `have`, falls on `frames`, which hold `need` at twice the size."""
        # The clip's first frame is one where others are two, and stands for the later of them.
        for frame, by_pixel in zip(frames, self.channels[-len(frames) :], strict=True):
            for row in range(2):
                for col in range(2):
                    to, of = _phase(need, have, row, col)
                    frame[to] += x[of].index_select(1, by_pixel[row, col])


def _phase(need: Window, have: Window, row: int, col: int) -> tuple[Place, Place]:
    """Where pixels of the given parity lie in `need`, and where those they come from lie in `have`, half its size."""
    to, of = [], []
    for inner, outer, parity in ((need.rows, have.rows, row), (need.cols, have.cols, col)):
        first = inner.start + (inner.start + parity) % 2
        to.append(slice(first - inner.start, None, 2))
        of.append(slice(first // 2 - outer.start, (inner.stop - 1 - parity) // 2 + 1 - outer.start))
    return (..., to[0], to[1]), (..., of[0], of[1])


class UpLevel(nn.Module):
    """One level of the decoder: residual blocks, upsampling, and Wan2.2's shortcut around both."""

    def __init__(self, state: State, shape: Level, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(state, block.name) for block in shape.blocks)
        self.upsampling = Upsampling(state, shape.upsample) if shape.upsample else None
        self.shortcut = Shortcut(shape.blocks[0].into, shape.upsample) if residual and shape.upsample else None

    def forward(self, x: torch.Tensor, past: Past, windows: tuple[Window, ...], need: Window) -> list[torch.Tensor]:
        """The frames that `x` becomes: `x` holds windows[0], each block gives the next, the frames hold `need`."""
        y = x
        for block, have, then in zip(self.blocks, windows, windows[1:], strict=False):
            y = block(y, past, have, then)
        if self.upsampling is None:
            return [y]
        frames = self.upsampling(y, past, windows[-1], need)
        if self.shortcut is not None:
            self.shortcut.add_to(frames, x, windows[0], need)
        return frames
