"""The host's idea of how much memory a Wan model needs, corrected for T3, in calls made for the patched model alone.

The host asks `BaseModel.memory_required`, which all clones of a model share. It is never changed: before sampling the
host is handed a shape whose estimate is the right one (as its own context windows do), and for batching a stand-in for
the model that answers this one question itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ..t3.cost import ModelShape
from ..t3.device_memory import allowed_bytes
from ..t3.memory import BlockShape, Share, block_bytes, pick, plain_block_bytes, shares
from . import wan
from .lend import in_parts

# A little more than counted: what is measured lies 2 to 4 % above (benchmarks/README.md), and allocators round up.
MARGIN = 1.1
# From so many tokens on a card is busy with one sample; batching condition and negative would only double the memory.
ONE_AT_A_TIME = 32_768
# float32 tensors of the latents' size that a sampler and the host hold around a forward pass: noise, latents, the
# sample, its copy for the model, results and counts of condition and negative, and the last step's.
AROUND = 10
# The same of what a model is given beside the latents in channels of its own, such as an image or a control video: in
# condition and negative, and once more where it is embedded.
GIVEN = 3
# Of a card, what a model and its forward passes may take between them: drivers, other programs and torch have the rest.
OF_CARD = 0.92


def block_shape(model, tokens: int, batch: int, element: int, beside: int = 0) -> BlockShape:
    """What the memory of a block of the host's diffusion model depends on; `beside`: tokens not of the video."""
    return BlockShape(model.dim, model.ffn_dim, model.num_heads, batch, tokens, element, beside)


def model_shape(model) -> ModelShape:
    """What the work of a forward pass of the host's diffusion model depends on."""
    return ModelShape(
        layers=len(model.blocks),
        dim=model.dim,
        ffn_dim=model.ffn_dim,
        heads=model.num_heads,
        in_channels=model.in_dim,
        out_channels=model.out_dim,
        text_dim=model.text_dim,
        text_tokens=model.text_len,
        patch=tuple(model.patch_size),
        control_layers=tuple(getattr(model, "vace_layers_mapping", {})),
    )


def ways(model) -> list[Share]:
    """How this model's blocks may share out their work, from fast to lean."""
    return shares(model.num_heads, all(in_parts(block.self_attn) for block in model.blocks))


def pass_bytes(model, shape: BlockShape, share: Share, compiled: bool = False) -> int:
    """Bytes one forward pass takes at its peak beyond weights and latents.

    A block, which runs whole where it is compiled or of another kind than we know; or the ends of the model: tokens
    embedded in float32 and cast, or the head's norm and modulation. The float32 rotations, four for each pair of
    channels, live throughout; for VACE so do the first tokens, the video's or the control's as it was embedded, and
    what goes into the block that is not at work.
    """
    whole = compiled or not wan.blocks(model)
    block = plain_block_bytes(shape) if whole else block_bytes(shape, share)
    rotations = shape.tokens * (shape.dim // shape.heads // 2) * 4 * 4
    embedded = shape.tensor + shape.tensor // shape.element * 4
    beside = 3 * shape.tensor if getattr(model, "vace_layers_mapping", None) else 0
    return rotations + beside + max(block, embedded, 3 * shape.tensor)


def memory_required(
    base: Any,
    shape: Sequence[int],
    cond_shapes: dict[str, list] | None = None,
    share: Share | None = None,
    compiled: bool = False,
    uncounted: int = 0,
) -> float:
    """Bytes one forward pass of `base` (a host `BaseModel`) needs under T3 on latents of `shape` `[B, C, T, H, W]`.

    Arguments as those of `BaseModel.memory_required`; `share`: the fastest if None; `uncounted`: tokens beside the
    video that `cond_shapes` leave out. Never more than the host itself says, which is taken for as many tokens.
    """
    model, cond_shapes = base.diffusion_model, cond_shapes or {}
    model = getattr(model, "_orig_mod", model)
    beside = sum(math.prod(s[2:]) for name in base.memory_usage_factor_conds for s in cond_shapes.get(name) or ())
    patch = math.prod(model.patch_size)
    tokens = int((math.prod(shape[2:]) + beside) / patch)
    all_beside = math.ceil(beside / patch) + uncounted
    block = block_shape(model, tokens + uncounted, shape[0], base.get_dtype_inference().itemsize, all_beside)
    channels = model.in_dim - model.out_dim + (getattr(model, "vace_in_dim", None) or 0)
    given = channels * shape[0] * math.prod(shape[2:]) * (GIVEN * 4 + block.element)
    ours = pass_bytes(model, block, share or Share(), compiled) * MARGIN + AROUND * math.prod(shape) * 4 + given
    return min(ours, base.memory_required(shape, cond_shapes=cond_shapes) * (tokens + uncounted) / tokens)


def is_compiled(wrappers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the host's compile node stands before or after T3; wrappers: of a patcher or of `transformer_options`."""
    return "torch.compile" in wrappers.get(WrappersMP.APPLY_MODEL, {})


def expected_share(mode: str, model, shape: Sequence[int], compiled: bool = False, uncounted: int = 0) -> Share:
    """How a forward pass on latents of `shape` will share out its work, before the model is loaded.

    mode: what the user chose, of `memory.MODES`; model: the patcher; compiled, uncounted: as `memory_required` takes
    them. `auto` supposes that it has the card for itself.
    """
    base, device = model.model, model.load_device
    found = ways(base.diffusion_model)
    total = comfy.model_management.get_total_memory(device)
    room = min(total, allowed_bytes(torch.device(device)) or total) * OF_CARD - model.model_size()
    return pick(mode, found, lambda share: memory_required(base, shape, None, share, compiled, uncounted), room)[0]


def prepare_sampling(mode: str, executor, model, noise_shape, conds, *args, **kwargs):
    """PREPARE_SAMPLING wrapper: the host decides what to offload by what T3 needs.

    The shape is used for nothing but the estimate, which is proportional to `T*H*W`: the width is scaled. Time is left
    for context windows to cut. Tokens beside the video are those of the condition that has most of them.
    """
    base = model.model
    compiled = is_compiled(model.wrappers)
    counted = base.memory_usage_factor_conds
    uncounted = max(
        (wan.tokens_beside(base.diffusion_model, noise_shape, cond, counted) for of in conds.values() for cond in of),
        default=0,
    )
    share = expected_share(mode, model, noise_shape, compiled, uncounted)
    needed = memory_required(base, noise_shape, None, share, compiled, uncounted)
    scale = needed / base.memory_required(noise_shape)
    *others, width = noise_shape
    return executor(model, [*others, max(1, math.ceil(width * scale))], conds, *args, **kwargs)


def calc_cond_batch(executor, model, conds, x_in, *args, **kwargs):
    """CALC_COND_BATCH wrapper: the host decides by T3's needs whether condition and negative run in one batch."""
    return executor(_Estimating(model, samples=x_in.shape[0]), conds, x_in, *args, **kwargs)


class _Estimating:
    """The host's `BaseModel` in everything but `memory_required`.

    A batch of more than `samples` at a size where batching gains nothing is declared to fit nowhere, so that the host
    runs condition and negative one after the other.
    """

    def __init__(self, base: Any, samples: int) -> None:
        self.__dict__.update(_base=base, _samples=samples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._base, name, value)

    def memory_required(self, input_shape: Sequence[int], cond_shapes: dict[str, list] | None = None) -> float:
        patch = math.prod(self._base.diffusion_model.patch_size)
        if input_shape[0] > self._samples and math.prod(input_shape[2:]) / patch >= ONE_AT_A_TIME:
            return math.inf
        return memory_required(self._base, input_shape, cond_shapes)
