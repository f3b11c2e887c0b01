"""The Wan2.1 VAE over a whole clip at once, differentiable: the same numbers as diffusers' loop over chunks.

diffusers runs the network chunk by chunk with a cache of features, and skips the time convolutions when it gets no
cache. Here every causal convolution sees the whole clip behind zeros, and the first frame follows the rules that the
loop gives it: it passes the temporal resampling untouched, and the frames after it are upsampled as if nothing came
before them. Features are `[B, T, H, W, C]`, contiguous, so that channels are last for every convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

CONFIG = {"base_dim": 12, "z_dim": 16}
CONVOLUTIONS = ("2d", "3d")


class ClipVae:
    """Encode and decode through an `AutoencoderKLWan`'s own parameters.

    Args:
        vae: a Wan2.1 layout (no patching, no residual down blocks).
        convolution: how a 3x3x3 convolution is computed: "3d", or "2d" over three frames' channels side by side.
        compiled: whether norm and activation are fused by torch.compile.
    """

    def __init__(self, vae: AutoencoderKLWan, convolution: str = "2d", compiled: bool = False) -> None:
        self.vae = vae
        self.convolution = convolution
        self._activate = torch.compile(norm_silu, dynamic=True) if compiled else norm_silu

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Video `[B, 3, 1 + 4n, H, W]` in [-1, 1] to mean and log-variance `[B, z, 1 + n, H/8, W/8]`, same dtype."""
        encoder = self.vae.encoder
        x = self._conv(video.permute(0, 2, 3, 4, 1).contiguous(), encoder.conv_in)
        for layer in encoder.down_blocks:
            x = self._down(x, layer) if hasattr(layer, "resample") else self._residual(x, layer)
        x = self._middle(x, encoder.mid_block)
        x = self._conv(self.activate(x, encoder.norm_out.gamma), encoder.conv_out)
        x = _pointwise(x, self.vae.quant_conv).permute(0, 4, 1, 2, 3)
        mean, log_variance = x.chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, z, 1 + n, h, w]` to video `[B, 3, 1 + 4n, 8h, 8w]`, not clamped to [-1, 1]; same dtype."""
        decoder = self.vae.decoder
        x = _pointwise(latents.permute(0, 2, 3, 4, 1).contiguous(), self.vae.post_quant_conv)
        x = self._middle(self._conv(x, decoder.conv_in), decoder.mid_block)
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = self._residual(x, layer)
            for layer in block.upsamplers or ():
                x = _up(x, layer)
        x = self._conv(self.activate(x, decoder.norm_out.gamma), decoder.conv_out)
        return x.permute(0, 4, 1, 2, 3)

    def activate(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """`norm_silu`, in two dimensions so that one compiled kernel serves all shapes."""
        return self._activate(x.reshape(-1, x.shape[-1]), gamma.flatten()).view(x.shape)

    def _conv(self, x: torch.Tensor, layer: nn.Conv3d) -> torch.Tensor:
        if layer.kernel_size == (1, 1, 1):
            return _pointwise(x, layer)
        return causal_convolution(x, layer.weight, layer.bias, self.convolution)

    def _residual(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        short = x if isinstance(block.conv_shortcut, nn.Identity) else _pointwise(x, block.conv_shortcut)
        x = self._conv(self.activate(x, block.norm1.gamma), block.conv1)
        return short + self._conv(self.activate(x, block.norm2.gamma), block.conv2)

    def _middle(self, x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        x = self._residual(x, block.resnets[0])
        for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(_attend(x, attention), layer)
        return x

    @staticmethod
    def _down(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        x = _conv_2d(F.pad(x, (0, 0, 0, 1, 0, 1)), layer.resample[1], stride=2, padding=0)
        if layer.mode == "downsample2d" or x.shape[1] == 1:
            return x
        taps = torch.cat((x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]), -1)
        return torch.cat((x[:, :1], _time_taps(taps, layer.time_conv)), 1)


def norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """SiLU of the RMS norm over the last dimension, in float32 at least; as diffusers' `WanRMS_norm` then `SiLU`."""
    return F.silu(_norm(x, gamma)).to(x.dtype)


def causal_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, how: str) -> torch.Tensor:
    """A 3x3x3 convolution that sees the present frame and the two before it, zeros before the first.

    `x` `[B, T, H, W, C]`, `weight` `[O, C, 3, 3, 3]` in any dtype; the result has `x`'s dtype.
    """
    frames, channels = x.shape[1], x.shape[-1]
    weight = weight.to(x.dtype)
    if frames == 1:
        return _frames_2d(x, weight[:, :, 2], bias)
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    if how == "3d":
        out = F.conv3d(padded.permute(0, 4, 1, 2, 3), weight, bias.to(x.dtype), padding=(0, 1, 1))
        return out.permute(0, 2, 3, 4, 1).contiguous()
    taps = [padded[:, i : i + frames] for i in range(3)]
    # Tensor cores take channels by eights.
    spare = -3 * channels % 8
    if spare:
        taps.append(x.new_zeros(1).expand(*x.shape[:-1], spare))
    flat = weight.transpose(1, 2).flatten(1, 2)
    return _frames_2d(torch.cat(taps, -1), F.pad(flat, (0, 0, 0, 0, 0, spare)), bias)


def _frames_2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1, padding: int = 1):
    batch, frames = x.shape[:2]
    out = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype), stride, padding)
    return out.permute(0, 2, 3, 1).contiguous().unflatten(0, (batch, frames))


def _conv_2d(x: torch.Tensor, layer: nn.Conv2d, stride: int = 1, padding: int = 1) -> torch.Tensor:
    return _frames_2d(x, layer.weight, layer.bias, stride, padding)


def _pointwise(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A convolution of kernel 1, 2-D or 3-D."""
    return F.linear(x, layer.weight.flatten(1).to(x.dtype), layer.bias.to(x.dtype))


def _time_taps(taps: torch.Tensor, layer: nn.Conv3d) -> torch.Tensor:
    """A 3x1x1 convolution over three frames' channels side by side."""
    weight = layer.weight.flatten(2).transpose(1, 2).flatten(1)
    return F.linear(taps, weight.to(taps.dtype), layer.bias.to(taps.dtype))


def _norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scale = wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt() * math.sqrt(x.shape[-1])
    return wide * scale * gamma.flatten()


def _attend(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    batch, frames, height, width, channels = x.shape
    y = _norm(x, block.norm.gamma).to(x.dtype)
    qkv = _pointwise(y, block.to_qkv).view(batch * frames, 1, height * width, 3 * channels)
    y = F.scaled_dot_product_attention(*qkv.chunk(3, -1)).view(x.shape)
    return x + _pointwise(y, block.proj)


def _up(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    if layer.mode == "upsample3d" and x.shape[1] > 1:
        rest = F.pad(x[:, 1:], (0, 0, 0, 0, 0, 0, 2, 0))
        doubled = _time_taps(torch.cat((rest[:, :-2], rest[:, 1:-1], rest[:, 2:]), -1), layer.time_conv)
        batch, frames, height, width, channels = doubled.shape
        doubled = doubled.view(batch, frames, height, width, 2, channels // 2).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        x = torch.cat((x[:, :1], doubled), 1)
    batch, frames, height, width, channels = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
    return _conv_2d(x.reshape(batch, frames, 2 * height, 2 * width, channels), layer.resample[1])
