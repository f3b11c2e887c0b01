"""RoPE's tables as one operator in compiled code.

A compiler fuses the host's tables into one kernel that takes a float64 power for every token and channel: 0.21 s of a
forward pass of 5.6 s at 4K on an H200, where the host's own steps, which take it once per channel, need a few
milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch

from ..t3.kernels.namespace import own_namespace
from .stand_in import StandIn, changed_by


class T3Rope(StandIn):
    """Stands in for the `forward` of the host's `EmbedND`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids`: `[B, N, axes]`, positions; returns the host's rotations, `[B, 1, N, channels/2, 2, 2]`, float32."""
        embedder: Any = self.module
        if torch.compiler.is_compiling():
            return _rope_tables(ids, list(embedder.axes_dim), float(embedder.theta))
        return type(embedder).forward(embedder, ids)


def embedder_of(model: Any) -> torch.nn.Module | None:
    """The module of this diffusion model that makes RoPE's tables, or None where it is none that is known."""
    from comfy.ldm.flux.layers import EmbedND

    found: Any = getattr(model, "rope_embedder", None)
    return found if type(found) is EmbedND and changed_by(found) is None else None


@torch.library.custom_op(f"{own_namespace(__name__)}::rope_tables", mutates_args=())
def _rope_tables(ids: torch.Tensor, axes: list[int], theta: float) -> torch.Tensor:
    """What `EmbedND.forward` computes."""
    from comfy.ldm.flux.math import rope

    return torch.cat([rope(ids[..., i], dim, theta) for i, dim in enumerate(axes)], dim=-3).unsqueeze(1)


@_rope_tables.register_fake
def _(ids, axes, theta):
    return ids.new_empty((ids.shape[0], 1, ids.shape[1], sum(axes) // 2, 2, 2), dtype=torch.float32)
