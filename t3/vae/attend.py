"""The attention of the middle stage: one head as wide as the layer, every pixel of a frame to every other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kernels.usable import triton_usable


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, memory: int | None) -> torch.Tensor:
    """Softmax attention of `[B, tokens, channels]`, scaled by 1 / sqrt(channels); the same shape, contiguous.

    memory: bytes that scores may take; queries are taken in parts where the attention at hand would take more.
    """
    if triton_usable(q.device, q.dtype):
        from ..kernels.wide_attention.kernel import fits, wide_attention

        if fits(q):
            return wide_attention(q, k, v)
    rows = q.shape[1] if memory is None or keeps_no_scores(q, k, v) else max(1, memory // score_bytes(q))
    k, v = k[:, None], v[:, None]
    parts = [F.scaled_dot_product_attention(some[:, None], k, v)[:, 0] for some in q.split(rows, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def keeps_no_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch computes this attention without storing scores, as far as it tells. Slow shapes need no splitting
    then, and splitting would leave a GPU idle."""
    if q.device.type != "cuda":
        return False
    params = torch.backends.cuda.SDPAParams(q[:, None], k[:, None], v[:, None], None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(params) or torch.backends.cuda.can_use_efficient_attention(
        params
    )


def score_bytes(q: torch.Tensor) -> int:
    """Bytes of scores per query: the scores, their softmax and a working copy, in float32 at least."""
    return 3 * q.shape[0] * q.shape[1] * max(4, q.element_size())
