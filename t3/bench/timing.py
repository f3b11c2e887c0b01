"""Times and peaks of work on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ..memory import GIB

Result = TypeVar("Result")


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """The result of one run and its milliseconds, between two events of the card's own clock (on a CPU: by wall)."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = work()
        end.record()
        torch.cuda.synchronize(device)
        return out, start.elapsed_time(end)
    begin = time.perf_counter()
    out = work()
    return out, (time.perf_counter() - begin) * 1e3


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 3, warm: int = 1) -> float:
    """Median of single runs, after `warm` that are not counted. Results are dropped at once."""
    for _ in range(warm):
        work()
    return statistics.median(timed(work, device)[1] for _ in range(repeats))


def steady(work: Callable[[], Result], device: torch.device, most_s: float = 0.5) -> tuple[Result, float]:
    """The result of one run, and the median of as many, up to seven, as fit `most_s` seconds; of slow work, of one.

    Nothing is warmed up: run `work`, or the like of it, once before.
    """
    out, first = timed(work, device)
    more = min(6, int(most_s * 1e3 / max(first, 1e-3)) - 1)
    return out, (milliseconds(work, device, more, 0) if more > 1 else first)


def release(device: torch.device) -> None:
    """Give a card's memory back that nothing holds any more, so that the next peak is its own."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def with_peak(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, dict[str, float]]:
    """The result, and `{"peak_gib": ...}` beyond what lay on the card before; empty on a CPU."""
    if device.type != "cuda":
        return work(), {}
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = work()
    torch.cuda.synchronize(device)
    return out, {"peak_gib": (torch.cuda.max_memory_allocated(device) - before) / GIB}


def round3(value: float) -> float:
    """Three significant digits: more would be noise."""
    return float(f"{value:.3g}") if abs(value) < 1000 else float(round(value))
