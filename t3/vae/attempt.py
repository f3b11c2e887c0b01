"""Work that may run out of memory: retried in smaller tiles, with a count of the work done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch

from ..errors import T3Error
from .memory import is_out_of_memory
from .plan import Plan
from .tiles import Window, split

Say = Callable[[str], object]


class Meter:
    """Counts work done; tells `progress` of it, and of the work in all."""

    def __init__(self, progress: Callable[[int, int], object] | None, total: int) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def add(self, work: int) -> None:
        self.done += work
        if self._progress is not None:
            self._progress(self.done, self.total)


def wait_for(device: torch.device) -> None:
    """Until the work given to a GPU is done: without it, progress runs ahead, and cancelling waits for all of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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


def tile_by_tile(
    parts: Iterable[Window],
    plan: Plan,
    once: Callable[[Window], bool],
    work: str,
    device: torch.device,
    scale: int,
    say: Say,
) -> None:
    """Do all of `parts`, in latents, in tiles of `plan`; smaller ones from where memory runs out.

    once: does one core; False if memory ran out. work: "decode" or "encode"; scale: pixels of a latent; say: told of
    smaller tiles. Raises T3Error if memory runs out with tiles of one latent.
    """
    todo = deque(core for part in parts for core in split(part, plan.tile))
    while todo:
        if once(todo[0]):
            todo.popleft()
            continue
        before = plan.tile
        if not plan.shrink():
            raise out_of_memory(device, f"{work} tiles of one latent", work)
        was, now = (f"{cols * scale} x {rows * scale}" for rows, cols in (before, plan.tile))
        say(f"{work}: memory ran out with tiles of {was} pixels; going on with {now}. Finished tiles are kept.")
        todo = deque(piece for core in todo for piece in split(core, plan.tile))


def out_of_memory(where: object, step: str, work: str) -> T3Error:
    """The error where not even the least step fits. work: "decode" or "encode"."""
    return T3Error(
        f"{where}: there is not even memory to {step}. Close other programs that use it, {work} on the CPU, or {work} "
        "a smaller picture."
    )
