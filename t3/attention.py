"""The T3 operation: attend inside local and strided windows of a token grid and take the mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .backends import BACKENDS, Backend, Situation, choose
from .errors import T3Error
from .plan import Grid, Partition
from .windows import groupings, window_indices

# CUDA kernels put batch x heads on a launch dimension that ends here.
MOST_BATCH_HEADS = 65_535


def t3_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    partition: Sequence[int],
    *,
    prefix: int = 0,
    backend: str | Backend = "auto",
    scale: float | None = None,
    memory: int | None = None,
) -> torch.Tensor:
    """T3 self-attention (arXiv 2512.13492): the mean of attention in local and in strided windows.

    q, k, v: `[B, N, heads, head_dim]`, normed and rotated, any float dtype, any strides; returns q's shape and dtype.
    grid: tokens `(t, h, w)`; partition: window counts `(t, h, w)`, which need not divide the grid.
    prefix: tokens before the grid. They and the `N - prefix - t*h*w` tokens after it are global: keys and values of
    every window, while their own queries attend every token.
    backend: a name in `t3.backends.BACKENDS`, `"auto"`, or a `Backend`. scale: of the scores, `head_dim**-0.5` if None.
    memory: bytes the grouped copies and their results may take beyond inputs and output; windows, then heads, are
    worked off in groups that fit. The result depends on it no more than the backend's result for one window and head
    depends on the others it gets at once: by rounding at most, with torch's.
    Groupings that coincide are computed once. Differentiable where the backend is.
    Raises `T3Error` for shapes that do not fit, an illegal partition, a backend that cannot serve the tensors, or a
    `memory` too small for one window and head.
    """
    here, counts = Grid(*grid), Partition(*partition)
    _check(q, k, v, here, counts, prefix)
    if isinstance(backend, str):
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        keys = [length + q.shape[1] - here.tokens for length in counts.window_lengths(here)]
        backend, _ = choose(backend, Situation(q.device, q.dtype, q.shape[-1], needs_grad, tuple(keys)))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if counts.windows == 1:
        return _attend_all(q, k, v, backend, scale, memory)

    end = prefix + here.tokens
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    inside = [x[:, prefix:end] for x in (q, k, v, out)]
    outside = [torch.cat([x[:, :prefix], x[:, end:]], dim=1) for x in (k, v)] if end - prefix < q.shape[1] else None
    for branch, kind in enumerate(groupings(here, counts)):
        for index in window_indices(tuple(here), tuple(counts), kind, q.device):
            _attend_windows(inside, outside, index, branch, backend, scale, memory)
    for rows in (slice(0, prefix), slice(end, q.shape[1])):
        if q[:, rows].shape[1]:
            out[:, rows] = _attend_all(q[:, rows], k, v, backend, scale, memory)
    return out


def _attend_windows(inside, outside, index, branch, backend, scale, memory) -> None:
    """Attend the windows `index` `[windows, tokens]` and write into `out`: the first branch as is, then the mean."""
    q, k, v, out = inside
    batch, size = q.shape[0], index.shape[1]
    keys = size + (outside[0].shape[1] if outside else 0)
    # Copies of q, k and v (the global keys' first, then the whole window's), the result and its merge.
    rows_copied = 3 * size + 2 * keys if outside else 5 * size
    for windows, some in _groups(q, index.shape[0], rows_copied, size, keys, backend, memory):
        rows = index[windows].flatten()
        count = rows.shape[0] // size
        taken = [x[:, :, some].index_select(1, rows).unflatten(1, (count, size)) for x in (q, k, v)]
        if outside:
            shared = [x[:, None, :, some].expand(-1, count, -1, -1, -1) for x in outside]
            taken[1:] = [torch.cat(pair, dim=2) for pair in zip(taken[1:], shared, strict=True)]
        attended = attend_window(backend, scale, *(x.flatten(0, 1) for x in taken))
        attended = attended.unflatten(0, (batch, count)).flatten(1, 2)
        target = out[:, :, some]
        if branch:
            # The released code's own order of rounding: sum in the working dtype, then halve.
            attended = (target.index_select(1, rows) + attended) / 2
        target.index_copy_(1, rows, attended.to(out.dtype))


def _attend_all(q, k, v, backend, scale, memory) -> torch.Tensor:
    """Dense attention of all of q over all of k and v, by groups of heads where `memory` asks for it."""
    queries = q.shape[1]
    groups = list(_groups(q, 1, 2 * queries, queries, k.shape[1], backend, memory))
    parts = [attend_window(backend, scale, q[:, :, some], k[:, :, some], v[:, :, some]) for _, some in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend_window(backend, scale, q, k, v) -> torch.Tensor:
    """Dense attention by `backend`. A single key takes the whole weight in any arithmetic; cuDNN refuses that case."""
    keys = k.shape[1]
    backend.check_keys(keys)
    return (BACKENDS["sdpa-math"] if keys == 1 else backend).attend(q, k, v, scale)


def _groups(
    q: torch.Tensor, windows: int, rows: int, queries: int, keys: int, backend: Backend, memory: int | None
) -> Iterator[tuple[slice, slice]]:
    """Slices of windows and of heads whose working bytes stay within `memory`, and whose launches are legal.

    rows: rows of head_dim elements that one window takes per head and sample.
    """
    batch, _, heads, head_dim = q.shape
    scores = 2 * queries * keys if backend.scores else 0
    each = batch * q.element_size() * (rows * head_dim + scores)
    fit = windows * heads if memory is None else memory // each
    if fit < 1:
        raise T3Error(
            f"memory is {memory:,} bytes, but {queries:,} tokens that attend {keys:,} need {each:,} for one head. "
            "Give at least that, or use a plan with smaller windows."
        )
    if q.device.type == "cuda":
        fit = min(fit, max(1, MOST_BATCH_HEADS // batch))
    some_heads = min(heads, fit)
    some_windows = max(1, fit // some_heads)
    for start in range(0, windows, some_windows):
        for head in range(0, heads, some_heads):
            yield slice(start, start + some_windows), slice(head, head + some_heads)


def _check(q, k, v, grid: Grid, partition: Partition, prefix: int) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise T3Error(f"q, k, v have shapes {shapes}; expected three equal [B, N, heads, head_dim].")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise T3Error(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one float dtype.")
    if prefix < 0 or prefix + grid.tokens > q.shape[1]:
        raise T3Error(
            f"a prefix of {prefix} and a grid of {tuple(grid)} = {grid.tokens} tokens do not fit {q.shape[1]} tokens."
        )
    partition.check(grid)
