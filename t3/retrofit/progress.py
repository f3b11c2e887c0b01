"""How far a stage is, in steps and in seconds, and what follows from it: learning rate, window counts, merge."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from .config import Stage


@dataclass
class Clock:
    """The seconds of a stage, over all sessions.

    started: when this session began on it. before: seconds of earlier sessions. lost: of all, those that went before
    the session's first step. aside: those in which something else than steps was done since.
    """

    started: float
    before: float = 0.0
    lost: float = 0.0
    aside: float = 0.0

    def seconds(self) -> float:
        """All of them."""
        return self.before + time.monotonic() - self.started

    def training(self) -> float:
        """Those of the steps."""
        return self.seconds() - self.lost - self.aside

    def begin(self) -> None:
        """The first step of this session is next: its start took what has passed, whatever was done in it."""
        self.lost += time.monotonic() - self.started

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"before": self.seconds(), "lost": self.lost, "aside": self.aside}


@dataclass
class Progress:
    """Where a run is. `training`, `seconds`: those of the stages that are over."""

    clock: Clock
    step: int = 0
    stage: int = 0
    stage_steps: int = 0
    training: float = 0.0
    seconds: float = 0.0

    def next_stage(self) -> None:
        """The stage is over; the next one begins now."""
        self.training += self.clock.training()
        self.seconds += self.clock.seconds()
        self.stage, self.stage_steps = self.stage + 1, 0
        self.clock = Clock(time.monotonic())

    def all_seconds(self) -> dict[str, float]:
        """Seconds of the run so far, and of its steps alone."""
        return {"seconds": self.seconds + self.clock.seconds(), "training": self.training + self.clock.training()}


def fraction(stage: Stage, steps: int, clock: dict[str, float], reserve: float) -> float:
    """How much of a stage is done after `steps`, in [0, 1].

    clock: "seconds" and "training" of the stage as its `Clock` has them, and "lost". reserve: seconds kept for its end.
    """
    parts = [0.0]
    if stage.steps:
        parts.append(steps / stage.steps)
    if stage.training_seconds:
        parts.append(clock["training"] / stage.training_seconds)
    if stage.max_seconds:
        # A slow start shortens the stage; it takes nothing from the rise of the learning rate.
        usable = stage.max_seconds - reserve - clock["lost"]
        parts.append((clock["seconds"] - clock["lost"]) / usable if usable > 0 else 1.0)
    return min(1.0, max(parts))


def learning_rate(stage: Stage, done: float) -> float:
    """The learning rate where the part `done` of a stage lies behind."""
    if done < stage.warmup:
        return stage.lr * done / stage.warmup
    if stage.decay == "constant":
        return stage.lr
    rest = (done - stage.warmup) / max(1e-9, 1 - stage.warmup)
    if stage.decay == "linear":
        return stage.lr * (1 + (stage.final_lr - 1) * rest)
    return stage.lr * (stage.final_lr + (1 - stage.final_lr) * (1 + math.cos(math.pi * rest)) / 2)


def windows(stage: Stage, done: float) -> float:
    """How far window counts have grown (see `Operator.windows`), in `window_levels` steps so that few shapes occur."""
    if done >= stage.windows_from_dense:
        return 1.0
    return math.floor(done / stage.windows_from_dense * stage.window_levels) / stage.window_levels


def merge(stage: Stage, done: float) -> float | None:
    """The weight of the mean against the merge by log-sum-exp; None once only the mean is left."""
    if done >= stage.merge_from_lse:
        return None
    return done / stage.merge_from_lse


def ways(stage: Stage) -> list[float]:
    """Parts of a stage, one for each of the ways its curriculum has blocks run: what compiling has to be done for."""
    found = [1.0]
    if stage.merge_from_lse:
        found.append(0.0)
    if stage.windows_from_dense:
        levels = stage.window_levels
        found += [(level + 0.5) / levels * stage.windows_from_dense for level in range(levels)]
    return found
