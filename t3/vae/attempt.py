"""Work that may run out of memory, and a count of the work done."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .memory import is_out_of_memory


class Meter:
    """Counts work done; tells `progress` of it, and of the work in all."""

    def __init__(self, progress: Callable[[int, int], object] | None, total: int) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def add(self, work: int) -> None:
        self.done += work
        if self._progress is not None:
            self._progress(self.done, self.total)


def attempt(work: Callable[[], None], device: torch.device, meter: Meter) -> bool:
    """Do the work; False, with the memory given back and the meter put back, if memory ran out."""
    done = meter.done
    try:
        work()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Only here, with the exception gone, are the tensors it held freed.
    meter.done = done
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False
