"""Weights of the host's layers for many calls in a row.

The host casts, moves or patches a layer's weights at each call, where they are stored in another dtype, elsewhere, or
with a LoRA beside them. A block that works by chunks of tokens calls each layer many times: here that is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F

from ..t3.block import Linear
from .stand_in import changed_by

Weights = tuple[torch.Tensor, torch.Tensor | None]
# Exactly these: a subclass (GGUF, quantised, fp8 products) has its own way to use its weights.
_LINEAR = (torch.nn.Linear, comfy.ops.disable_weight_init.Linear, comfy.ops.manual_cast.Linear)
_NORM = (torch.nn.LayerNorm, comfy.ops.disable_weight_init.LayerNorm, comfy.ops.manual_cast.LayerNorm)
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def plain(module: torch.nn.Module) -> bool:
    """Whether this layer does no more than multiply by its weight and add its bias, whatever it does to get them."""
    return type(module) in _LINEAR and changed_by(module) is None and type(module.weight) in _TENSORS


def in_parts(attn: Any) -> bool:
    """Whether projections of a self-attention can be made of some heads alone."""
    return all(plain(layer) for layer in (attn.q, attn.k, attn.v))


def linear(module: torch.nn.Module, like: torch.Tensor) -> Linear:
    """A linear layer for inputs like `like`: with weights at hand where it is `plain`, else to be called as it is."""
    if not plain(module):
        return Linear(module)
    weight, bias = weights(module, like)
    return Linear(partial(F.linear, weight=weight, bias=bias), weight, bias)


def layer_norm(module: torch.nn.Module) -> bool:
    """Whether this is an ordinary layer norm."""
    return type(module) in _NORM and changed_by(module) is None


def weights(module: Any, like: torch.Tensor) -> Weights:
    """Weight and bias as the host would use them on `like`: the layer's own where they fit, else copies of ours.

    Copies, since the host casts into buffers that it uses again for the next layer.
    """
    changed = any(getattr(module, name, None) for name in ("weight_function", "bias_function"))
    if not changed and all(_fits(x, like) for x in (module.weight, module.bias)):
        return module.weight, module.bias
    if not isinstance(module, comfy.ops.CastWeightBiasOp):
        # torch's own layer, which would refuse such an input: let it.
        return module.weight, module.bias
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    copies = weight.clone(), None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return copies


def lender(module: torch.nn.Module, like: torch.Tensor) -> Callable[..., AbstractContextManager[Weights]] | None:
    """For `feed_forward`: lends the weights of this one layer, made ready now; None where the layer is not `plain`."""
    if not plain(module):
        return None
    at_hand = weights(module, like)

    @contextmanager
    def lend(layer: torch.nn.Module, x: torch.Tensor) -> Iterator[Weights]:
        assert layer is module
        yield at_hand

    return lend


def _fits(x: torch.Tensor | None, like: torch.Tensor) -> bool:
    return x is None or (x.dtype == like.dtype and x.device == like.device)
