"""`window_group` as operators of torch's, so that compiled code holds it whole."""

from __future__ import annotations

import torch

from ..namespace import own_namespace
from ..usable import triton_usable
from . import naive

_OURS = own_namespace(__name__)


@torch.library.custom_op(f"{_OURS}::window_group", mutates_args=())
def window_group(
    x: torch.Tensor,
    rows: list[torch.Tensor | None],
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """See `naive.window_group`; by Triton where it serves. One or two groupings, new tensors. Has no gradients."""
    return _by_best(x)(x, rows, weight, eps, cos, sin)


@window_group.register_fake
def _(x, rows, weight=None, eps=0.0, cos=None, sin=None):
    batch, tokens, width = x.shape
    return [x.new_empty((batch * tokens, width)) for _ in rows]


@torch.library.custom_op(f"{_OURS}::window_group_into", mutates_args=("outs",))
def window_group_into(
    x: torch.Tensor,
    outs: list[torch.Tensor],
    rows: list[torch.Tensor | None],
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    inverse: torch.Tensor | None = None,
) -> None:
    """The same into tensors that are there, for some of the tokens and of the heads at a time."""
    _by_best(x)(x, rows, weight, eps, cos, sin, inverse, outs=outs)


@window_group_into.register_fake
def _(x, outs, rows, weight=None, eps=0.0, cos=None, sin=None, inverse=None):
    return None


def _by_best(x: torch.Tensor):
    if not triton_usable(x.device, x.dtype):
        return naive.window_group
    from .kernel import window_group as by_triton

    return by_triton
