"""Every parameter of Wan's video VAEs (2.1 and 2.2): original name, diffusers name, shape.

The two generations nest their stages differently. Original 2.1 numbers all layers of a side in one list; original 2.2
has one residual stage per level (`downsamples.I.downsamples.J`). diffusers keeps the flat list in the 2.1 encoder and
uses stages elsewhere. Names and shapes are enumerated here from the config; nothing is renamed by pattern.
Sources: Wan2.1 `vae.py`, Wan2.2 `vae2_2.py`, diffusers `AutoencoderKLWan`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .layout_dit import Layout, Param

_Row = tuple[str, str, tuple[int, ...]]


def _conv(original: str, theirs: str, out: int, into: int, kernel: tuple[int, ...]) -> Iterator[_Row]:
    yield f"{original}.weight", f"{theirs}.weight", (out, into, *kernel)
    yield f"{original}.bias", f"{theirs}.bias", (out,)


def _residual(original: str, theirs: str, into: int, out: int) -> Iterator[_Row]:
    yield f"{original}.residual.0.gamma", f"{theirs}.norm1.gamma", (into, 1, 1, 1)
    yield from _conv(f"{original}.residual.2", f"{theirs}.conv1", out, into, (3, 3, 3))
    yield f"{original}.residual.3.gamma", f"{theirs}.norm2.gamma", (out, 1, 1, 1)
    yield from _conv(f"{original}.residual.6", f"{theirs}.conv2", out, out, (3, 3, 3))
    if into != out:
        yield from _conv(f"{original}.shortcut", f"{theirs}.conv_shortcut", out, into, (1, 1, 1))


def _middle(side: str, dim: int) -> Iterator[_Row]:
    original, theirs = f"{side}.middle", f"{side}.mid_block"
    yield from _residual(f"{original}.0", f"{theirs}.resnets.0", dim, dim)
    yield f"{original}.1.norm.gamma", f"{theirs}.attentions.0.norm.gamma", (dim, 1, 1)
    yield from _conv(f"{original}.1.to_qkv", f"{theirs}.attentions.0.to_qkv", 3 * dim, dim, (1, 1))
    yield from _conv(f"{original}.1.proj", f"{theirs}.attentions.0.proj", dim, dim, (1, 1))
    yield from _residual(f"{original}.2", f"{theirs}.resnets.1", dim, dim)


def _head(side: str, dim: int, out: int) -> Iterator[_Row]:
    yield f"{side}.head.0.gamma", f"{side}.norm_out.gamma", (dim, 1, 1, 1)
    yield from _conv(f"{side}.head.2", f"{side}.conv_out", out, dim, (3, 3, 3))


def _encoder(config: dict[str, Any]) -> Iterator[_Row]:
    dims = [config["base_dim"] * mult for mult in (1, *config["dim_mult"])]
    nested, count = config["is_residual"], config["num_res_blocks"]
    yield from _conv("encoder.conv1", "encoder.conv_in", dims[0], config["in_channels"], (3, 3, 3))
    flat = 0
    for level, (into, out) in enumerate(pairwise(dims)):
        for j in range(count):
            original = f"encoder.downsamples.{level}.downsamples.{j}" if nested else f"encoder.downsamples.{flat}"
            theirs = f"encoder.down_blocks.{level}.resnets.{j}" if nested else f"encoder.down_blocks.{flat}"
            yield from _residual(original, theirs, into if j == 0 else out, out)
            flat += 1
        if level < len(dims) - 2:
            original = f"encoder.downsamples.{level}.downsamples.{count}" if nested else f"encoder.downsamples.{flat}"
            theirs = f"encoder.down_blocks.{level}.downsampler" if nested else f"encoder.down_blocks.{flat}"
            yield from _conv(f"{original}.resample.1", f"{theirs}.resample.1", out, out, (3, 3))
            if config["temperal_downsample"][level]:
                yield from _conv(f"{original}.time_conv", f"{theirs}.time_conv", out, out, (3, 1, 1))
            flat += 1
    yield from _middle("encoder", dims[-1])
    yield from _head("encoder", dims[-1], 2 * config["z_dim"])


def _decoder(config: dict[str, Any]) -> Iterator[_Row]:
    base, mults = config.get("decoder_base_dim") or config["base_dim"], config["dim_mult"][::-1]
    dims = [base * mult for mult in (mults[0], *mults)]
    nested, count = config["is_residual"], config["num_res_blocks"] + 1
    temporal = config["temperal_downsample"][::-1]
    yield from _conv("decoder.conv1", "decoder.conv_in", dims[0], config["z_dim"], (3, 3, 3))
    yield from _middle("decoder", dims[0])
    flat = 0
    for level, (into, out) in enumerate(pairwise(dims)):
        if level > 0 and not nested:
            into //= 2  # 2.1 halves the channels while it upsamples; 2.2 keeps them
        stage = f"decoder.up_blocks.{level}"
        for j in range(count):
            original = f"decoder.upsamples.{level}.upsamples.{j}" if nested else f"decoder.upsamples.{flat}"
            yield from _residual(original, f"{stage}.resnets.{j}", into if j == 0 else out, out)
            flat += 1
        if level < len(dims) - 2:
            original = f"decoder.upsamples.{level}.upsamples.{count}" if nested else f"decoder.upsamples.{flat}"
            theirs = f"{stage}.upsampler" if nested else f"{stage}.upsamplers.0"
            yield from _conv(f"{original}.resample.1", f"{theirs}.resample.1", out if nested else out // 2, out, (3, 3))
            if temporal[level]:
                yield from _conv(f"{original}.time_conv", f"{theirs}.time_conv", 2 * out, out, (3, 1, 1))
            flat += 1
    yield from _head("decoder", dims[-1], config["out_channels"])


def vae_layout(config: dict[str, Any]) -> Layout:
    """Original parameter name -> (diffusers name, shape), for an `AutoencoderKLWan` config."""
    z = config["z_dim"]
    rows = [
        *_encoder(config),
        *_conv("conv1", "quant_conv", 2 * z, 2 * z, (1, 1, 1)),
        *_conv("conv2", "post_quant_conv", z, z, (1, 1, 1)),
        *_decoder(config),
    ]
    return {original: Param(theirs, shape) for original, theirs, shape in rows}


def _encoder_levels(shapes: dict[str, tuple[int, ...]], nested: bool) -> tuple[list[int], int, list[bool]]:
    """Output width of each level, residual blocks per level, and which downsamplers also halve time."""
    step = re.compile(r"encoder\.downsamples\." + (r"(\d+)\.downsamples\." if nested else "()") + r"(\d+)\.")
    places = sorted({(int(m[1] or 0), int(m[2])) for key in shapes if (m := step.match(key))})
    widths, counts, temporal = [], [0], []
    for stage, index in places:
        name = f"encoder.downsamples.{stage}.downsamples.{index}" if nested else f"encoder.downsamples.{index}"
        if f"{name}.resample.1.weight" in shapes:
            temporal.append(f"{name}.time_conv.weight" in shapes)
            counts.append(0)
        else:
            if counts[-1] == 0:
                widths.append(shapes[f"{name}.residual.6.weight"][0])
            counts[-1] += 1
    if len(set(counts)) != 1:
        raise ValueError(f"uneven levels {counts}")
    return widths, counts[0], temporal


def vae_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `AutoencoderKLWan` config (without latent statistics) that fits these original-named shapes.

    Raises KeyError, IndexError or ValueError when the shapes are not those of a Wan VAE.
    """
    nested = "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes
    base, decoder_base = shapes["encoder.conv1.weight"][0], shapes["decoder.head.0.gamma"][0]
    widths, count, temporal = _encoder_levels(shapes, nested)
    into = shapes["encoder.conv1.weight"][1]
    patch = math.isqrt(into // 3) if nested else 1
    return {
        "base_dim": base,
        "decoder_base_dim": None if decoder_base == base else decoder_base,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [size // base for size in widths],
        "num_res_blocks": count,
        "temperal_downsample": temporal,
        "is_residual": nested,
        "in_channels": into,
        "out_channels": shapes["decoder.head.2.weight"][0],
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": patch * 2 ** len(temporal),
    }


def vae_config_from_diffusers(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """As `vae_config`, for diffusers-named shapes."""
    nested = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    # Only what `vae_config` looks at is renamed; the layout it leads to then accounts for every name.
    renamed = {
        "encoder.conv1.weight": shapes["encoder.conv_in.weight"],
        "decoder.head.0.gamma": shapes["decoder.norm_out.gamma"],
        "decoder.head.2.weight": shapes["decoder.conv_out.weight"],
        "conv2.weight": shapes["post_quant_conv.weight"],
    }
    if nested:
        renamed["decoder.upsamples.0.upsamples.0.residual.2.weight"] = shapes[
            "decoder.up_blocks.0.resnets.0.conv1.weight"
        ]
    counted = len({key.split(".")[4] for key in shapes if key.startswith("encoder.down_blocks.0.resnets.")})
    for key, shape in shapes.items():
        if not key.startswith("encoder.down_blocks."):
            continue
        name = key.replace("down_blocks", "downsamples", 1)
        if nested:
            name = name.replace(".resnets.", ".downsamples.").replace(".downsampler.", f".downsamples.{counted}.")
        renamed[name.replace(".conv2.", ".residual.6.")] = shape
    return vae_config(renamed)
