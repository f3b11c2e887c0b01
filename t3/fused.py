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
from .memory import joined_bytes
from .plan import Grid, Partition
from .windows import token_rows


def refusal(*projected: torch.Tensor) -> str | None:
    """Why the kernels are not to be used for these tensors, in words, or None if they are."""
    x = projected[0]
    if torch.is_grad_enabled() and any(p.requires_grad for p in projected):
        return "it has no gradients"
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
    prefix: int = 0,
    suffix: int = 0,
    backend: str | Backend = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """T3 self-attention (see `t3_attention`) of projected q, k, v, `[B, N, heads*head_dim]` each, any strides.

    norms: weights `[heads*head_dim]` of the RMS norms of q and k over the whole width; eps: theirs.
    turns: cosine and sine `[1 or B, N, head_dim/2]`, float, any strides, by which q's and k's pairs of neighbouring
    channels are turned, every head alike: (a, b) becomes (a cos - b sin, a sin + b cos).
    prefix, suffix: tokens before and after the grid's; they are global, as in `t3_attention`.
    Holds, beyond its inputs, at most the groups of both groupings (six times q) and one result; with tokens beside the
    grid, `memory.joined_bytes` more.
    Returns `[B, N, heads*head_dim]`. No gradients. Where Triton is missing plain torch computes the same.
    """
    here, counts = Grid(*grid), Partition(*partition)
    _check(q, k, v, here, counts, heads, turns, prefix, suffix)
    head_dim = q.shape[2] // heads
    if isinstance(backend, str):
        keys = tuple(length + prefix + suffix for length in counts.window_lengths(here))
        backend, _ = choose(backend, Situation(q.device, q.dtype, head_dim, windows=keys))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    batch = q.shape[0]
    rows = list(token_rows(tuple(here), tuple(counts), batch, q.device))
    norm_q, norm_k = (None, None) if norms is None else norms
    cos, sin = (None, None) if turns is None else turns
    end = prefix + here.tokens
    tables = [x if x is None else x[:, prefix:end] for x in (cos, sin)]
    groups: list[Sequence[torch.Tensor]] = list(
        zip(
            window_group(q[:, prefix:end], rows, norm_q, eps, *tables),
            window_group(k[:, prefix:end], rows, norm_k, eps, *tables),
            _group_values(v[:, prefix:end], rows),
            strict=True,
        )
    )
    outside = None
    if prefix or suffix:
        tables = [x if x is None else rows_around(x, prefix, suffix) for x in (cos, sin)]
        outside = [
            window_group(rows_around(x, prefix, suffix), [None], norm, eps, *tables)[0].unflatten(0, (batch, -1))
            for x, norm in ((q, norm_q), (k, norm_k))
        ]
        outside.append(rows_around(v, prefix, suffix))
    return attend_groups(groups, rows, here, counts, heads, backend, scale, outside, prefix)


def _group_values(v: torch.Tensor, rows: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """v for each grouping, `[B * N, width]`: itself where its tokens stay in their place."""
    moved = [at for at in rows if at is not None]
    copies = iter(window_group(v, moved) if moved else [])
    return [v.flatten(0, 1) if at is None else next(copies) for at in rows]


def rows_around(x: torch.Tensor, prefix: int, suffix: int) -> torch.Tensor:
    """Of `[B, N, ...]` the first `prefix` and the last `suffix` rows, `[B, prefix + suffix, ...]`, a copy."""
    return torch.cat([x[:, :prefix], x[:, x.shape[1] - suffix :]], dim=1)


def attend_groups(
    groups: list[Sequence[torch.Tensor]],
    rows: list[torch.Tensor | None],
    grid: Grid,
    partition: Partition,
    heads: int,
    backend: Backend,
    scale: float,
    outside: Sequence[torch.Tensor] | None = None,
    prefix: int = 0,
) -> torch.Tensor:
    """T3 attention of what was grouped, in the order of the tokens, `[B, N, heads*head_dim]`, a tensor of its own.

    groups: for each of `rows` (see `token_rows`) q, k and v, `[B * grid, heads*head_dim]`; the list is emptied, a group
    let go of once it has been attended. outside: q, k, v of the tokens beside the grid, `[B, beside, heads*head_dim]`,
    of which the first `prefix` stand before it; None if there are none.
    """
    batch = groups[0][0].shape[0] // grid.tokens
    beside = None if outside is None else outside[1:]
    parts = []
    while groups:
        group = groups.pop(0)
        parts.append(attend_windows(group, grid, partition, batch, heads, backend, scale, beside))
    alone = None
    if outside is not None:
        # Attention does not depend on the order of its keys, so those of one sample may stay grouped.
        at = None if batch == 1 else rows[-1]
        keys, values = group[1], group[2]
        del group
        keys = torch.cat([_in_order(keys, at, batch), outside[1]], dim=1)
        values = torch.cat([_in_order(values, at, batch), outside[2]], dim=1)
        alone = attend_all(outside[0], keys, values, heads, backend, scale)
        del keys, values
    else:
        del group
    out = parts[0].unflatten(0, (batch, -1)) if rows == [None] else window_merge(parts, rows, batch)
    return out if alone is None else torch.cat([alone[:, :prefix], out, alone[:, prefix:]], dim=1)


def _in_order(x: torch.Tensor, at: torch.Tensor | None, batch: int) -> torch.Tensor:
    """`[B, N, width]` from rows that were grouped."""
    return x.unflatten(0, (batch, -1)) if at is None else window_merge([x], [at], batch)


def attend_windows(
    grouped: Sequence[torch.Tensor],
    grid: Grid,
    partition: Partition,
    batch: int,
    heads: int,
    backend: Backend,
    scale: float,
    beside: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention inside the windows of one grouping, of some heads or all.

    grouped: its q, k, v `[B * N, heads*head_dim]`, tokens in the order of `token_rows`, any strides but the last.
    beside: k and v of the tokens beside the grid, `[B, beside, heads*head_dim]`, which every window attends too.
    Returns q's shape, contiguous, a tensor of its own.
    """
    classes = [(batch * windows, size) for windows, size in partition.window_classes(grid)]
    if is_one_operator(backend):
        numbers = [n for pair in classes for n in pair]
        return _attend_classes(*grouped, numbers, heads, backend.name, scale, *(beside or ()))
    return _attend(grouped, classes, heads, backend, scale, beside)


def attend_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: Backend, scale: float
) -> torch.Tensor:
    """Dense attention of q `[B, M, heads*head_dim]` over k, v `[B, N, heads*head_dim]`. Returns q's shape, a tensor of
    its own."""
    if is_one_operator(backend):
        return _attend_densely(q, k, v, heads, backend.name, scale)
    return _dense(q, k, v, heads, backend, scale)


def is_one_operator(backend: Backend) -> bool:
    """Compiled code holds attention whole, since a compiler gains nothing inside and may not know a backend's kernels;
    an operator's arguments must say which backend."""
    return torch.compiler.is_compiling() and BACKENDS.get(backend.name) is backend


@torch.library.custom_op(f"{own_namespace(__name__)}::attend_windows", mutates_args=())
def _attend_classes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    classes: list[int],
    heads: int,
    backend: str,
    scale: float,
    k_beside: torch.Tensor | None = None,
    v_beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """`_attend` as one operator. classes: windows and their length, one class after the other."""
    pairs = list(zip(classes[::2], classes[1::2], strict=True))
    beside = None if k_beside is None or v_beside is None else (k_beside, v_beside)
    return _attend((q, k, v), pairs, heads, BACKENDS[backend], scale, beside)


@_attend_classes.register_fake
def _(q, k, v, classes, heads, backend, scale, k_beside=None, v_beside=None):
    return q.new_empty(q.shape)


@torch.library.custom_op(f"{own_namespace(__name__)}::attend_all", mutates_args=())
def _attend_densely(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: str, scale: float
) -> torch.Tensor:
    """`_dense` as one operator."""
    return _dense(q, k, v, heads, BACKENDS[backend], scale)


@_attend_densely.register_fake
def _(q, k, v, heads, backend, scale):
    return q.new_empty(q.shape)


def _dense(q, k, v, heads: int, backend: Backend, scale: float) -> torch.Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
    return attend_window(backend, scale, q, k, v).flatten(2).contiguous()


def _attend(
    grouped: Sequence[torch.Tensor],
    classes: list[tuple[int, int]],
    heads: int,
    backend: Backend,
    scale: float,
    beside: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    if beside is not None:
        return _attend_joined(grouped, classes, heads, backend, scale, beside)
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


def _attend_joined(grouped, classes, heads: int, backend: Backend, scale: float, beside) -> torch.Tensor:
    """`_attend`, each window's keys and values joined with those beside the grid, some windows and heads at a time.

    The places where they are joined serve one group of windows after the other, so that what stands beside the grid is
    copied once a sample and not once a window.
    """
    q = grouped[0]
    batch, extra, width = beside[0].shape
    head_dim = width // heads
    result = q.new_empty(q.shape)
    room = joined_bytes(q.numel() * q.element_size())
    start = 0
    for total, size in classes:
        windows = total // batch
        fit = max(1, min(room // (2 * (size + extra) * head_dim * q.element_size()), MOST_BATCH_HEADS))
        some_heads = min(heads, fit)
        at_once = min(windows, fit // some_heads)
        for head in range(0, width, some_heads * head_dim):
            channels = slice(head, min(head + some_heads * head_dim, width))
            joined = [x.new_empty(at_once, size + extra, channels.stop - head) for x in beside]
            for sample in range(batch):
                for place, x in zip(joined, beside, strict=True):
                    place[:, size:] = x[sample, :, channels]
                for first in range(0, windows, at_once):
                    count = min(at_once, windows - first)
                    begin = start + (sample * windows + first) * size
                    own = [x[begin : begin + count * size, channels].unflatten(0, (count, size)) for x in grouped]
                    for place, x in zip(joined, own[1:], strict=True):
                        place[:count, :size] = x
                    some = [x.unflatten(2, (-1, head_dim)) for x in (own[0], *(place[:count] for place in joined))]
                    attended = attend_window(backend, scale, *some).flatten(2).flatten(0, 1)
                    result[begin : begin + count * size, channels] = attended
        start += total * size
    return result


def _check(q, k, v, grid: Grid, partition: Partition, heads: int, turns, prefix: int, suffix: int) -> None:
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise T3Error(f"q, k, v have shapes {shapes}; expected three equal [B, N, heads*head_dim].")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise T3Error(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one float dtype.")
    if min(prefix, suffix) < 0 or q.shape[1] != prefix + grid.tokens + suffix:
        beside = f", with {prefix} before and {suffix} after it," if prefix or suffix else ""
        raise T3Error(f"a grid of {tuple(grid)} has {grid.tokens} tokens{beside} but q has {q.shape[1]}.")
    if q.shape[2] % (2 * heads):
        raise T3Error(f"{q.shape[2]} channels are not {heads} heads of an even size.")
    pairs = q.shape[2] // heads // 2
    for table in turns or ():
        if table.shape not in ((1, q.shape[1], pairs), (q.shape[0], q.shape[1], pairs)):
            raise T3Error(f"turns have shape {tuple(table.shape)}; expected [1 or B, {q.shape[1]}, {pairs}].")
    partition.check(grid)
