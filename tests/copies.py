"""Bytes that copies move while something runs, counted by torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
MOVES = {aten.copy_, aten.clone, aten._to_copy, aten.cat, aten.index_select, aten.constant_pad_nd}


class Copies(TorchDispatchMode):
    """`moved`: bytes written by operators that compute nothing; `found`: which, with their shapes.

    least: smaller results are not counted. What custom operators do inside is not seen.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.moved = 0
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in MOVES and out.numel() * out.element_size() >= self.least:
            self.moved += out.numel() * out.element_size()
            self.found.append((str(func), tuple(out.shape)))
        return out


def attend_like_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of `[B, N, heads, head_dim]` whose result lies in memory as q does: cuDNN's and FlashAttention's way.

    None of its own copies are counted.
    """
    with _disable_current_modes():
        some = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*some, scale=scale).transpose(1, 2)
        return out.contiguous()
