"""`window_merge` as operators of torch's, so that compiled code holds it whole."""

from __future__ import annotations

import torch

from ..namespace import own_namespace
from ..usable import triton_usable
from . import naive

_OURS = own_namespace(__name__)


@torch.library.custom_op(f"{_OURS}::window_merge", mutates_args=())
def window_merge(parts: list[torch.Tensor], rows: list[torch.Tensor | None], batch: int) -> torch.Tensor:
    """See `naive.window_merge`; by Triton where it serves. A new tensor. Has no gradients."""
    return _by_best(parts)(parts, rows, batch)


@window_merge.register_fake
def _(parts, rows, batch):
    return parts[0].new_empty(parts[0].shape).unflatten(0, (batch, -1))


@torch.library.custom_op(f"{_OURS}::window_merge_into", mutates_args=("out",))
def window_merge_into(parts: list[torch.Tensor], rows: list[torch.Tensor | None], out: torch.Tensor) -> None:
    """The same into a tensor that is there, `[batch, N, width]`."""
    _by_best(parts)(parts, rows, out.shape[0], out=out)


@window_merge_into.register_fake
def _(parts, rows, out):
    return None


def _by_best(parts: list[torch.Tensor]):
    if not triton_usable(parts[0].device, parts[0].dtype):
        return naive.window_merge
    from .kernel import window_merge as by_triton

    return by_triton
