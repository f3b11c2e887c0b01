"""Time backends on the card at hand, within a few seconds."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .registry import BACKENDS, Backend, Situation
from .table import NO_TIME, Entry, versions

log = logging.getLogger(__name__)
# For all the tuning of one process.
SECONDS = 3.0
# Work that fills a card, in tokens and heads: 64 MiB for each of q, k, v and the result in half precision.
TOKENS, HEADS = 32_768, 8
Clock = Callable[[], float]
Timer = Callable[[Backend, Situation, int, int, int], float]
_left = SECONDS


def milliseconds(backend: Backend, s: Situation, windows: int, window: int, heads: int, repeats: int = 3) -> float:
    """Median time of `backend` for `windows` windows of `window` tokens, after one run to warm up."""
    # Random numbers of its own: what the user draws stays the same whether this ran or not.
    generator = torch.Generator(s.device).manual_seed(0)
    shape = (windows, window, heads, s.head_dim)
    with torch.inference_mode(), torch.cuda.device(s.device):
        q, k, v = (torch.randn(shape, generator=generator, device=s.device, dtype=s.dtype) for _ in range(3))
        times = []
        for _ in range(1 + repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            backend.attend(q, k, v, s.head_dim**-0.5)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def tune(
    s: Situation,
    window: int,
    names: Sequence[str],
    *,
    seconds: float | None = None,
    patient: bool = False,
    timer: Timer = milliseconds,
    clock: Clock = time.perf_counter,
) -> Entry | None:
    """Time the backends called `names` on windows of `window` tokens; None where no time is left for it.

    seconds: begin no further backend after so long; what is left of `SECONDS` in this process if None. `patient`: also
    those that compile for long, which nothing can interrupt. What fails is named in the entry, not raised.
    """
    global _left
    allowed = _left if seconds is None else seconds
    if allowed <= 0:
        return None
    began = clock()
    # Windows times heads is a launch dimension, which ends at 65,535.
    windows, heads = min(max(1, TOKENS // window), 8_000), max(1, min(HEADS, HEADS * TOKENS // window))
    log.info("T3: timing attention backends for windows of %s tokens, once.", f"{window:,}")
    ms: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        if BACKENDS[name].slow_start and not patient:
            failed[name] = "compiles for longer than tuning may take"
        elif clock() - began > allowed:
            failed[name] = NO_TIME
        else:
            try:
                ms[name] = round(timer(BACKENDS[name], s, windows, window, heads), 4)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    if seconds is None:
        _left -= clock() - began
    assert s.capability is not None
    return Entry(
        card=s.card,
        capability=s.capability,
        dtype=str(s.dtype).removeprefix("torch."),
        head_dim=s.head_dim,
        window=window,
        windows=windows,
        heads=heads,
        ms=ms,
        failed=failed,
        versions=versions(),
        date=time.strftime("%Y-%m-%d"),
        source="python -m t3.backends --measure" if patient else "tuning before first use",
    )
