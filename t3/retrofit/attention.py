"""T3 attention to train through: windows by one permutation each way, branches merged by a mean that can be annealed.

The same operation as `t3.t3_attention`, laid out for gradients. Grouping is a permutation of the tokens, and so is its
gradient: both are plain gathers, where autograd's own gradient of a gather is a scattered sum (slow on a card, and in
an order that differs from run to run).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from ..attention import MOST_BATCH_HEADS, attend_window
from ..backends import Backend, Situation, choose
from ..plan import Grid, Partition
from ..windows import LOCAL, STRIDED, groupings, window_indices
from .logsumexp import window_logsumexp

BRANCHES = {"local": (LOCAL,), "strided": (STRIDED,)}


def training_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    partition: Sequence[int],
    *,
    branches: str = "both",
    mean: torch.Tensor | None = None,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """T3 self-attention of `[B, t*h*w, heads, head_dim]`, with gradients; returns the same shape and dtype.

    branches: "both" is T3; "local" or "strided" is that grouping alone.
    mean: weight in [0, 1], a tensor without dimensions, of the branches' mean against their merge by log-sum-exp,
    which is the attention over the keys of both windows together. None is the mean alone: T3.
    """
    here, counts = Grid(*grid), Partition(*partition)
    head_dim = q.shape[-1]
    if isinstance(backend, str):
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        backend, _ = choose(backend, Situation(q.device, q.dtype, head_dim, needs_grad))
    scale = 1 / math.sqrt(head_dim)
    if counts.windows == 1:
        return attend_window(backend, scale, q, k, v)
    kinds = groupings(here, counts)
    if branches != "both" and len(kinds) == 2:
        kinds = BRANCHES[branches]
    parts, weights = [], []
    for kind in kinds:
        there, back, classes = _layout(tuple(here), tuple(counts), kind, q.device)
        grouped = [_Permute.apply(x, there, back) for x in (q, k, v)]
        parts.append(_Permute.apply(_attend(grouped, classes, backend, scale), back, there))
        if mean is not None and len(kinds) == 2:
            sums = _each_class(grouped[:2], classes, lambda q, k: window_logsumexp(q, k, scale))
            weights.append(_Permute.apply(sums, back, there))
    if len(parts) == 1:
        return parts[0]
    if mean is None:
        return (parts[0] + parts[1]) / 2
    local = torch.sigmoid(weights[0] - weights[1])[..., None]
    local = torch.lerp(local, torch.full_like(local, 0.5), mean.to(local))
    return torch.lerp(parts[1].float(), parts[0].float(), local.float()).to(q.dtype)


class _Permute(torch.autograd.Function):
    """`x[:, there]`, whose gradient is `[:, back]`; `back` undoes `there`."""

    @staticmethod
    def forward(x, there, back):
        return x.index_select(1, there)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, there, back = inputs
        ctx.save_for_backward(there, back)

    @staticmethod
    def backward(ctx, grad):
        there, back = ctx.saved_tensors
        return _Permute.apply(grad, back, there), None, None


@torch.compiler.assume_constant_result  # compiled code holds the tensors instead of building them at each call
def _layout(grid, partition, kind, device):
    return _cached_layout(grid, partition, kind, device)


@lru_cache(maxsize=256)
def _cached_layout(grid, partition, kind, device):
    """The permutation that puts windows one after the other, its inverse, and `(windows, tokens in each)` by class."""
    with torch.inference_mode(False):
        classes = window_indices(grid, partition, kind, torch.device("cpu"))
        there = torch.cat([index.flatten() for index in classes])
        back = torch.empty_like(there)
        back[there] = torch.arange(len(there))
        return there.to(device), back.to(device), tuple((index.shape[0], index.shape[1]) for index in classes)


def _attend(grouped, classes, backend: Backend, scale: float) -> torch.Tensor:
    return _each_class(grouped, classes, lambda q, k, v: attend_window(backend, scale, q, k, v))


def _each_class(grouped, classes, work) -> torch.Tensor:
    """`work` on each class of equal windows of tensors `[B, N, ...]`, which it gets as `[B * windows, tokens, ...]`."""
    batch, _, heads = grouped[0].shape[:3]
    results, start = [], 0
    for windows, size in classes:
        count = windows * size
        some = [x[:, start : start + count].reshape(batch * windows, size, *x.shape[2:]) for x in grouped]
        at_once = max(1, MOST_BATCH_HEADS // heads)
        pieces = [work(*(x[first : first + at_once] for x in some)) for first in range(0, batch * windows, at_once)]
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        results.append(found.reshape(batch, count, *found.shape[2:]))
        start += count
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)
