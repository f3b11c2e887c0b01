"""Which tokens stand in which window: index tensors that group a grid and put it back. Any torch device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from .plan import Grid, Partition

LOCAL, STRIDED = "local", "strided"
Size = tuple[int, int, int]


def axis_groups(length: int, count: int, kind: str) -> list[torch.Tensor]:
    """Positions of one axis in its groups, those of equal length stacked: `[groups, group length]`, at most two."""
    positions = torch.arange(length)
    short, longer = divmod(length, count)
    if kind == LOCAL:
        cut = longer * (short + 1)
        parts = [positions[:cut].view(longer, short + 1), positions[cut:].view(count - longer, short)]
    else:
        # Rows are rounds of `count`; the last, unfinished round belongs to the first `longer` groups.
        rounds = positions[: short * count].view(short, count)
        rest = positions[short * count :].view(1, longer)
        parts = [torch.cat([rounds[:, :longer], rest]).T, rounds[:, longer:].T]
    return [part for part in parts if part.shape[0]]


@torch.compiler.assume_constant_result  # compiled code holds the tensors instead of building them at each call
def window_indices(grid: Size, partition: Size, kind: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Token indices of every window of one grouping, windows of equal size together.

    Returns at most 8 int64 tensors `[windows, tokens in a window]` on `device`, kept for the next call. Together they
    hold each token of the grid exactly once; tokens of a window are in token order. `kind` is `LOCAL` or `STRIDED`.
    `grid` and `partition` are plain tuples, since torch.compile cannot pass others on.
    """
    return _window_indices(grid, partition, kind, device)


@lru_cache(maxsize=64)
def _window_indices(grid: Size, partition: Size, kind: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    _, height, width = grid
    classes = []
    # They are kept, and a tensor of inference mode cannot be trained through later.
    with torch.inference_mode(False):
        times, rows, columns = (axis_groups(n, c, kind) for n, c in zip(grid, partition, strict=True))
        for t in times:
            for h in rows:
                for w in columns:
                    index = (t[:, None, None, :, None, None] * height + h[None, :, None, None, :, None]) * width
                    index = index + w[None, None, :, None, None, :]
                    count = t.shape[0] * h.shape[0] * w.shape[0]
                    classes.append(index.reshape(count, -1).to(device))
    return tuple(classes)


@torch.compiler.assume_constant_result
def token_rows(grid: Size, partition: Size, batch: int, device: torch.device) -> tuple[torch.Tensor | None, ...]:
    """For each grouping a layer must compute, the row where each token stands once the windows are put together.

    int32 `[batch, N]` on `device`, kept for the next call; None where every token stays in its place. Classes of equal
    windows follow each other in the order of `window_indices`; within a class sample follows sample, so that a class
    is one dense batch of `batch * windows` windows.
    """
    return _token_rows(grid, partition, batch, device)


@lru_cache(maxsize=64)
def _token_rows(grid: Size, partition: Size, batch: int, device: torch.device) -> tuple[torch.Tensor | None, ...]:
    found = []
    with torch.inference_mode(False):
        for kind in groupings(grid, partition):
            classes = _window_indices(grid, partition, kind, torch.device("cpu"))
            rows = torch.empty(batch, Grid(*grid).tokens, dtype=torch.int32)
            start = 0
            for index in classes:
                count = index.numel()
                rows[:, index.flatten()] = torch.arange(start, start + batch * count, dtype=torch.int32).view(batch, -1)
                start += batch * count
            stays = torch.equal(rows.flatten(), torch.arange(rows.numel(), dtype=torch.int32))
            found.append(None if stays else rows.to(device))
    return tuple(found)


def groupings(grid: Sequence[int], partition: Sequence[int]) -> tuple[str, ...]:
    """The groupings a layer must compute: one where local and strided coincide, both otherwise."""
    return (LOCAL,) if Partition(*partition).coincides(Grid(*grid)) else (LOCAL, STRIDED)
