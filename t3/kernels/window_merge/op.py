"""`window_merge` as an operator of torch's, so that compiled code holds it whole."""

from __future__ import annotations

import torch

from ..namespace import own_namespace
from ..usable import triton_usable
from . import naive

_OURS = own_namespace(__name__)


@torch.library.custom_op(f"{_OURS}::window_merge", mutates_args=())
def window_merge(parts: list[torch.Tensor], rows: list[torch.Tensor | None], batch: int) -> torch.Tensor:
    """See `naive.window_merge`; by Triton where it serves. Has no gradients."""
    if not triton_usable(parts[0].device, parts[0].dtype):
        return naive.window_merge(parts, rows, batch)
    from .kernel import window_merge as by_triton

    return by_triton(parts, rows, batch)


@window_merge.register_fake
def _(parts, rows, batch):
    return parts[0].new_empty(parts[0].shape).unflatten(0, (batch, -1))
