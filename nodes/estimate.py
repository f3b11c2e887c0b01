"""The host's idea of how much memory a Wan model needs, corrected for T3 while a patched model is at work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def corrected(base: Any, *, samples: int | None = None) -> Iterator[None]:
    """Within it, `base.memory_required` (of the host's `BaseModel`) answers for T3; afterwards it is what it was.

    Never more than the host's own estimate. With `samples`, a batch of more than that many at a size where batching
    gains nothing is declared to fit nowhere, so that the host runs condition and negative one after the other.
    """
    with replaced(base, _estimate(base, samples)):
        yield


@contextmanager
def replaced(base: Any, estimate: Callable) -> Iterator[None]:
    """Shadow `base.memory_required`, on this instance only, for the time of a `with` block."""
    former = base.__dict__.get("memory_required")
    base.__dict__["memory_required"] = estimate
    try:
        yield
    finally:
        if former is None:
            del base.__dict__["memory_required"]
        else:
            base.__dict__["memory_required"] = former


def _estimate(base: Any, samples: int | None) -> Callable:
    model, host = base.diffusion_model, base.memory_required
    shape = model_shape(model)
    patch = math.prod(shape.patch)
    element = base.get_dtype_inference().itemsize

    def memory_required(input_shape: Sequence[int], cond_shapes: dict[str, list] | None = None) -> float:
        cond_shapes = cond_shapes or {}
        tokens = math.prod(input_shape[2:]) / patch
        if samples is not None and input_shape[0] > samples and tokens >= ONE_AT_A_TIME:
            return math.inf
        beside = sum(math.prod(s[2:]) for name in base.memory_usage_factor_conds for s in cond_shapes.get(name) or ())
        ours = activation_bytes(shape, int(tokens + beside / patch), batch=input_shape[0], element=element)
        return min(ours * MARGIN, host(input_shape, cond_shapes=cond_shapes))

    return memory_required
