"""T3 attention straight from the projections: norm, rotation and grouping in one pass, and one pass that merges.

Does what RMS norm, rotary embedding and `t3_attention` do one after the other, with each rounding in between left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .attention import MOST_BATCH_HEADS, attend_window
from .backends import BACKENDS, Backend, Situation, choose
from .errors import T3Error
from .kernels.namespace import own_namespace
from .kernels.usable import triton_usable
from .kernels.window_group.op import window_group
from .kernels.window_merge.op import window_merge
from .plan import Grid, Partition
from .windows import token_rows


def refusal(*projected: torch.Tensor, prefix: int = 0, suffix: int = 0) -> str | None:
    """Why the kernels are not to be used for these tensors, in words, or None if they are.

    prefix, suffix: tokens beside the grid.
    """
    x = projected[0]
    if torch.is_grad_enabled() and any(p.requires_grad for p in projected):
        return "it has no gradients"
    if prefix or suffix:
        return "tokens stand beside the grid"
    if not triton_usable(x.device, x.dtype):
        return f"its kernels need Triton and an NVIDIA card, and take no {x.dtype} on {x.device}"
    return None


def norm_weight(norm: torch.nn.RMSNorm, like: torch.Tensor) -> torch.Tensor:
    """The weight of an RMS norm, `[width]`, as it would be used on `like`.

    By asking the norm itself: its own weight may lie on another device, in another dtype, or be changed on the way. The
    norm of equal channels as large as these is one, whatever the epsilon.
    """
    return norm(like.new_full((1, 1, like.shape[-1]), 1024.0)).flatten()


def attention_from_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    partition: Sequence[int],
    *,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 1e-6,
    turns: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | Backend = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """T3 self-attention (see `t3_attention`) of projected q, k, v, `[B, t*h*w, heads*head_dim]` each, any strides.

    norms: weights `[heads*head_dim]` of the RMS norms of q and k over the whole width; eps: theirs.
    turns: cosine and sine `[1 or B, N, head_dim/2]`, float, any strides, by which q's and k's pairs of neighbouring
    channels are turned, every head alike: (a, b) becomes (a cos - b sin, a sin + b cos).
    Holds, beyond its inputs, at most the groups of both groupings (six times q) and one result.
    Returns `[B, N, heads*head_dim]`. No gradients. Where Triton is missing plain torch computes the same.
    """
    here, counts = Grid(*grid), Partition(*partition)
    _check(q, k, v, here, counts, heads, turns)
    head_dim = q.shape[2] // heads
    if isinstance(backend, str):
        windows = counts.window_lengths(here)
        backend, _ = choose(backend, Situation(q.device, q.dtype, head_dim, windows=windows))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    batch = q.shape[0]
    rows = list(token_rows(tuple(here), tuple(counts), batch, q.device))
    norm_q, norm_k = (None, None) if norms is None else norms
    cos, sin = (None, None) if turns is None else turns
    groups = list(
        zip(
            window_group(q, rows, norm_q, eps, cos, sin),
            window_group(k, rows, norm_k, eps, cos, sin),
            _group_values(v, rows),
            strict=True,
        )
    )
    parts = []
    for _ in rows:
        # A group is let go of once it has been attended.
        group, *groups = groups
        parts.append(attend_windows(group, here, counts, batch, heads, backend, scale))
    del group
    if rows == [None]:
        return parts[0].unflatten(0, (batch, -1))
    return window_merge(parts, rows, batch)


def _group_values(v: torch.Tensor, rows: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """v for each grouping, `[B * N, width]`: itself where its tokens stay in their place."""
    moved = [at for at in rows if at is not None]
    copies = iter(window_group(v, moved) if moved else [])
    return [v.flatten(0, 1) if at is None else next(copies) for at in rows]


def attend_windows(
    grouped: Sequence[torch.Tensor],
    grid: Grid,
    partition: Partition,
    batch: int,
    heads: int,
    backend: Backend,
    scale: float,
) -> torch.Tensor:
    """Attention inside the windows of one grouping, of some heads or all.

    grouped: its q, k, v `[B * N, heads*head_dim]`, tokens in the order of `token_rows`, any strides but the last.
    Returns the same shape, contiguous, a tensor of its own.
    """
    classes = [(batch * windows, size) for windows, size in partition.window_classes(grid)]
    if torch.compiler.is_compiling() and BACKENDS.get(backend.name) is backend:
        return _attend_classes(*grouped, [n for pair in classes for n in pair], heads, backend.name, scale)
    return _attend(grouped, classes, heads, backend, scale)


@torch.library.custom_op(f"{own_namespace(__name__)}::attend_windows", mutates_args=())
def _attend_classes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, classes: list[int], heads: int, backend: str, scale: float
) -> torch.Tensor:
    """`_attend` as one operator: compiled code holds it whole, since a compiler gains nothing inside and may not know
    a backend's kernels. classes: windows and their length, one class after the other."""
    pairs = list(zip(classes[::2], classes[1::2], strict=True))
    return _attend((q, k, v), pairs, heads, BACKENDS[backend], scale)


@_attend_classes.register_fake
def _(q, k, v, classes, heads, backend, scale):
    return q.new_empty(q.shape)


def _attend(
    grouped: Sequence[torch.Tensor], classes: list[tuple[int, int]], heads: int, backend: Backend, scale: float
) -> torch.Tensor:
    at_once = max(1, MOST_BATCH_HEADS // heads)
    result, start, total = None, 0, grouped[0].shape[0]
    for windows, size in classes:
        for first in range(0, windows, at_once):
            count = min(at_once, windows - first)
            some = [x[start : start + count * size] for x in grouped]
            some = [x.unflatten(0, (count, size)).unflatten(2, (heads, -1)) for x in some]
            attended = attend_window(backend, scale, *some).flatten(2).flatten(0, 1)
            if count * size == total:
                return attended
            if result is None:
                result = attended.new_empty(total, attended.shape[1])
            result[start : start + count * size] = attended
            start += count * size
    assert result is not None
    return result


def _check(q, k, v, grid: Grid, partition: Partition, heads: int, turns) -> None:
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise T3Error(f"q, k, v have shapes {shapes}; expected three equal [B, N, heads*head_dim].")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise T3Error(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one float dtype.")
    if q.shape[1] != grid.tokens:
        raise T3Error(f"a grid of {tuple(grid)} has {grid.tokens} tokens, but q has {q.shape[1]}.")
    if q.shape[2] % (2 * heads):
        raise T3Error(f"{q.shape[2]} channels are not {heads} heads of an even size.")
    pairs = q.shape[2] // heads // 2
    for table in turns or ():
        if table.shape not in ((1, grid.tokens, pairs), (q.shape[0], grid.tokens, pairs)):
            raise T3Error(f"turns have shape {tuple(table.shape)}; expected [1 or B, {grid.tokens}, {pairs}].")
    partition.check(grid)
