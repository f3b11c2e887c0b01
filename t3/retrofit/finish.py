"""What a run leaves: its weights as a file, sampled clips; and how long that takes, so that it fits into the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from ..errors import T3Error
from . import checkpoint
from .model import trained_grid
from .output import PREFIX, write_full, write_lora
from .session import Session

_DISK = 200e6  # bytes a second that the first estimate counts on
_MARGIN = 1.5
_LEAST = 2.0  # seconds


class Finish:
    """The last acts of a run. `timed` measures them whenever they are done before."""

    def __init__(self, session: Session, folder: Path, aside: Callable[[float], None], words: Any = None) -> None:
        """`aside` is told how many seconds each of these acts took. words: the group by which several processes wait
        for each other."""
        self.session = session
        self.folder = folder
        self.sampler = _sampler(session)
        trained = sum(parameter.numel() for parameter in session.parameters)
        # Weights, average and two moments; then the result.
        self.aside = aside
        self.words = words
        self.took = {"checkpoint": 16 * trained / _DISK, "write": 4 * trained / _DISK}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure a `with` block as what `name` takes."""
        if self.session.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # steps that are still under way are no part of it
        start = time.monotonic()
        yield
        self.took[name] = time.monotonic() - start
        self.aside(self.took[name])

    def reserve(self) -> float:
        """Seconds that the end of the run will take."""
        return _LEAST + _MARGIN * sum(self.took.values())

    @property
    def name(self) -> str:
        """The result's file name: the run's, and what it is."""
        return f"{self.folder.name}{'' if self.full else '-lora'}.safetensors"

    @property
    def full(self) -> bool:
        return self.session.config.trainable.what == "everything"

    def write(self) -> Path | None:
        """Write the averaged weights (where there are any) for the programs that use them; the path, where it is."""
        session, found = self.session, self.session.found
        with session.average.applied() if session.average is not None else contextlib.nullcontext():
            weights = checkpoint.weights(session.objective, frozen=self.full)
        if not session.main:
            return None
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
        path, dtype = self.folder / self.name, session.config.output.dtype
        grid = trained_grid(session.clips, tuple(found.config["patch_size"]))
        branches = session.config.model.branches
        plan = found.plan if branches == "both" else None
        if plan is None:
            session.say(f"the weights are for {branches} windows alone, which no plan says: the file carries none.")
        with self.timed("write"):
            if self.full:
                write_full(path, weights, found.config, plan, grid, dtype)
            else:
                asked = session.config.trainable
                scale = (asked.alpha or asked.rank) / asked.rank
                write_lora(path, weights, session.before, scale, plan, grid, dtype)
        session.say(f"written: {path}")
        return path

    def sample(self, step: int) -> None:
        """Sample the prompts of `[samples]`, on the first process while the others wait; a failure there is told and
        does not end the run."""
        if not self.session.config.samples.prompts:
            return
        from .samples import sample

        with self.timed("samples"):
            if self.sampler is not None:
                try:
                    sample(self.session, self.sampler, self.folder / "samples" / f"step-{step:08}")
                except torch.OutOfMemoryError as error:
                    what = str(error).partition("\n")[0]
                    self.session.say(
                        f"step {step}: no samples: out of memory: {what} A smaller height, width or frames in "
                        "[samples] needs less."
                    )
                except (T3Error, OSError) as error:
                    self.session.say(f"step {step}: no samples: {error}")
            if self.words is not None:
                torch.distributed.barrier(group=self.words)


def _sampler(session: Session) -> Any:
    """What samples the prompts of `[samples]`, or None. Raises `T3Error` for missing parts, before any step."""
    config = session.config
    if not config.samples.prompts or not session.main:
        return None
    if session.accelerator.distributed_type == DistributedType.FSDP:
        raise T3Error("[samples] needs the whole model on one process, which FSDP does not have. Leave prompts empty.")
    from ..generate import NEGATIVE_PROMPT
    from .samples import Sampler

    return Sampler(session, NEGATIVE_PROMPT)
