"""What ComfyUI's Wan models look like to windowed attention: which blocks, and where the video lies in the tokens.

Everything here was read from the host's own model code (`comfy/ldm/wan`); each layout names what it follows. The number
of tokens is checked again where attention runs: if the host puts them elsewhere, that model runs dense and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..t3 import Grid
from ..t3.errors import T3Error

Conds = Mapping[str, Any]
PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Layout:
    """Where the video's grid lies in the token sequence: `prefix` tokens, the grid, `suffix` tokens.

    `suffix` is None where the host appends tokens in ways not worth repeating here: then all that follows the grid is.
    """

    grid: Grid
    prefix: int = 0
    suffix: int | None = 0

    @property
    def beside(self) -> int | None:
        """Tokens beside the grid, or None where that is known only once the sequence is there."""
        return None if self.suffix is None else self.prefix + self.suffix

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` can have this layout."""
        rest = tokens - self.prefix - self.grid.tokens
        return rest >= 0 if self.suffix is None else rest == self.suffix


def _grid(latent: torch.Tensor, patch: tuple[int, int, int]) -> Grid:
    """The grid of `[B, C, T, H, W]` latents, which the host pads up to whole patches."""
    return Grid(*(math.ceil(n / p) for n, p in zip(latent.shape[2:], patch, strict=True)))


def _tokens(latent: torch.Tensor, patch: tuple[int, int, int]) -> int:
    """Tokens of latents that the host embeds as they are, cutting what is no whole patch."""
    return math.prod(n // p for n, p in zip(latent.shape[2:], patch, strict=True))


def _video(model, x: torch.Tensor, conds: Conds) -> Layout:
    """`WanModel`: one reference image before the video (Fun-Control), frames and latents in context after it."""
    patch = model.patch_size
    prefix = suffix = 0
    reference = conds.get("reference_latent")
    if model.ref_conv is not None and reference is not None:
        prefix = math.prod(n // p for n, p in zip(reference.shape[-2:], patch[1:], strict=True))
    if (frames := conds.get("time_dim_concat")) is not None:
        suffix += _grid(frames, patch).tokens
    suffix += sum(_grid(latent, patch).tokens for latent in conds.get("context_latents") or ())
    return Layout(_grid(x, patch), prefix, suffix)


def _audio_video(model, x: torch.Tensor, conds: Conds) -> Layout:
    """`HumoWanModel`: reference frames after the video."""
    reference = conds.get("reference_latent")
    suffix = 0 if reference is None else _tokens(reference, model.patch_size)
    return Layout(_grid(x, model.patch_size), 0, suffix)


def _speech_video(model, x: torch.Tensor, conds: Conds) -> Layout:
    """`WanModel_S2V`: a reference frame and packed motion frames, all after the video."""
    return Layout(_grid(x, model.patch_size), 0, None)


def _posed_video(model, x: torch.Tensor, conds: Conds) -> Layout:
    """`SCAILWanModel`: reference frames before the video, frames in context and pose latents after it."""
    patch = model.patch_size
    reference, frames, pose = (conds.get(name) for name in ("reference_latent", "time_dim_concat", "pose_latents"))
    prefix = 0 if reference is None else _grid(reference, patch).tokens
    suffix = sum(_grid(latent, patch).tokens for latent in (frames, pose) if latent is not None)
    return Layout(_grid(x, patch), prefix, suffix)


# Class names, not classes: importing every variant costs seconds, and a host may lack some.
_LAYOUTS: dict[str, Callable[[Any, torch.Tensor, Conds], Layout]] = {
    "WanModel": _video,
    "VaceWanModel": _video,
    "CameraWanModel": _video,
    "AnimateWanModel": _video,
    "WanDancerModel": _video,
    "HumoWanModel": _audio_video,
    "WanModel_S2V": _speech_video,
    "SCAILWanModel": _posed_video,
    "SCAIL2WanModel": _posed_video,
}


def layout(model, x: torch.Tensor, conds: Conds) -> Layout:
    """The layout of one forward pass of a Wan model on `[B, C, T, H, W]` latents with these conditions."""
    return _LAYOUTS.get(type(model).__name__, _video)(model, x, conds)


def tokens_beside(model, shape: Sequence[int], cond: Mapping[str, Any], but: Collection[str]) -> int:
    """Tokens beside the video in a forward pass on latents of `shape` `[B, C, T, H, W]`, as far as nodes tell of them.

    cond: a condition as nodes leave it, before the host makes one for the model of it; but: those not to be counted, by
    the names that the model has for them.
    """
    references = cond.get("reference_latents")
    named = {name: cond.get(name) for name in ("time_dim_concat", "context_latents")}
    named["reference_latent"] = references[-1] if references else None
    conds = {name: latents for name, latents in named.items() if latents is not None and name not in but}
    if not conds:
        return 0
    return layout(model, torch.empty(shape, device="meta"), conds).beside or 0


class SelfAttention(NamedTuple):
    """A self-attention that can be windowed: its path below the diffusion model, its module, its layer of the plan."""

    path: str
    module: Any
    layer: int


class SelfAttentions(NamedTuple):
    """Those that can be windowed, and the paths of those that cannot."""

    windowed: list[SelfAttention]
    left_dense: list[str]


class Block(NamedTuple):
    """A block of the host's own kind: its path below the diffusion model, its module, its layer of the plan."""

    path: str
    module: Any
    layer: int


def require(model) -> None:
    """Raise `T3Error` for a diffusion model that is not Wan."""
    from comfy.ldm.wan.model import WanModel

    if not isinstance(model, WanModel):
        raise T3Error(
            f"T3 works on Wan video models, and this one is a {type(model).__name__}. Connect a Wan2.1 or Wan2.2 "
            "model, or remove the node."
        )


def self_attentions(model) -> SelfAttentions:
    """Every self-attention over the video's tokens. A VACE block has the plan layer of the block whose output it joins.

    Raises `T3Error` for a model that is not Wan, or none of whose self-attention can be windowed.
    """
    from comfy.ldm.wan.model import WanSelfAttention

    require(model)
    name = type(model).__name__
    found = [SelfAttention(f"blocks.{i}.self_attn", block.self_attn, i) for i, block in enumerate(model.blocks)]
    for layer, j in getattr(model, "vace_layers_mapping", {}).items():
        found.append(SelfAttention(f"vace_blocks.{j}.self_attn", model.vace_blocks[j].self_attn, layer))
    # Exactly this class: what a subclass computes is not known here.
    windowed = [attention for attention in found if type(attention.module) is WanSelfAttention]
    if not windowed:
        raise T3Error(
            f"{name} computes its self-attention in a way of its own ({type(found[0].module).__name__}), which cannot "
            "be cut into windows. Use an ordinary Wan model, or remove the node."
        )
    return SelfAttentions(windowed, [a.path for a in found if type(a.module) is not WanSelfAttention])


def blocks(model) -> list[Block]:
    """Every block whose forward is known here: exactly `WanAttentionBlock`, or the one that VACE adds."""
    from comfy.ldm.wan.model import VaceWanAttentionBlock, WanAttentionBlock

    found = [Block(f"blocks.{i}", block, i) for i, block in enumerate(model.blocks) if type(block) is WanAttentionBlock]
    for layer, j in getattr(model, "vace_layers_mapping", {}).items():
        if type(model.vace_blocks[j]) is VaceWanAttentionBlock:
            found.append(Block(f"vace_blocks.{j}", model.vace_blocks[j], layer))
    return found


def head_size(model) -> int:
    """Channels of one attention head."""
    return model.dim // model.num_heads


def latent_channels(model) -> int:
    """Channels of the latents a Wan model makes: 16, or 48 for Wan2.2 5B."""
    return model.out_dim
