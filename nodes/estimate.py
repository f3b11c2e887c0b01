"""The host's idea of how much memory a Wan model needs, corrected for T3, in calls made for the patched model alone.

The host asks `BaseModel.memory_required`, which all clones of a model share. It is never changed: before sampling the
host is handed a shape whose estimate is the right one (as its own context windows do), and for batching a stand-in for
the model that answers this one question itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..t3.cost import ModelShape, activation_bytes

# A little more than counted: what is measured lies 2 to 4 % above (benchmarks/README.md), and allocators round up.
MARGIN = 1.1
# From so many tokens on a card is busy with one sample; batching condition and negative would only double the memory.
ONE_AT_A_TIME = 32_768


def model_shape(model) -> ModelShape:
    """The sizes of a Wan diffusion model of the host that its cost depends on."""
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
    )


def memory_required(base: Any, shape: Sequence[int], cond_shapes: dict[str, list] | None = None) -> float:
    """Bytes one forward pass of `base` (a host `BaseModel`) needs under T3 on latents of `shape` `[B, C, T, H, W]`.

    Arguments as those of `BaseModel.memory_required`, and never more than that says.
    """
    model = base.diffusion_model
    sizes, cond_shapes = model_shape(model), cond_shapes or {}
    patch = math.prod(sizes.patch)
    beside = sum(math.prod(s[2:]) for name in base.memory_usage_factor_conds for s in cond_shapes.get(name) or ())
    tokens = int((math.prod(shape[2:]) + beside) / patch)
    ours = activation_bytes(sizes, tokens, batch=shape[0], element=base.get_dtype_inference().itemsize)
    return min(ours * MARGIN, base.memory_required(shape, cond_shapes=cond_shapes))


def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
    """PREPARE_SAMPLING wrapper: the host decides what to offload by what T3 needs.

    The shape is used for nothing but the estimate, which is proportional to `T*H*W`: the width is scaled down. Time is
    left for context windows to cut.
    """
    base = model.model
    scale = memory_required(base, noise_shape) / base.memory_required(noise_shape)
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
