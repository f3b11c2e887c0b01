"""One process that works off jobs on one card: takes the next one that fits into the time, until none does."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..files import say
from .jobs import ADHERENCE, MEASURE, RUN, TUNE, Job
from .results import Results
from .settings import Study

_MARGIN = 1.25  # on the time that the slowest job of its kind took beside its steps
_NEAR = 8  # jobs among which order matters less than a compilation
_FAILURES = 2  # one after the other: the card or the settings are at fault, not a job


@dataclass
class Claims:
    """A folder by which workers agree: NAME is there once a job is taken, NAME.end once it is over."""

    folder: Path

    def take(self, name: str) -> bool:
        """True for one worker alone."""
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def taken(self, name: str) -> bool:
        return (self.folder / name).exists()

    def end(self, name: str) -> None:
        (self.folder / f"{name}.end").touch()

    def under_way(self) -> bool:
        """Whether any job has been taken and is not over."""
        names = {path.name for path in self.folder.iterdir()}
        return any(not name.endswith(".end") and f"{name}.end" not in names for name in names)


def expected(study: Study, results: Results) -> Callable[[Job], float]:
    """How many seconds a job will take, as a function: its steps, and what jobs like it took beside theirs."""
    known = [(job, found["wall_seconds"] - found.get("training_seconds", 0.0)) for job, found in results.all()]

    def seconds(job: Job) -> float:
        alike = [(other.row, value) for other, value in known if (other.kind, other.steps) == (job.kind, job.steps)]
        own = [value for row, value in alike if row == job.row]
        beside = max(own or [value for _, value in alike], default=None)
        steps = study.seconds(job.fraction) if job.kind in (TUNE, RUN) else 0.0
        return steps + (study.overhead_seconds if beside is None else _MARGIN * beside)

    return seconds


def rate_of(study: Study, results: Results, job: Job, untuned: bool) -> float | None:
    """The rate a job trains at; None while its row's tries are not through."""
    row = study.row(job.row)
    if job.kind == TUNE:
        return job.rate
    if job.kind != RUN:
        return 0.0
    return row.rates[len(row.rates) // 2] if untuned else results.rate(study, row)


def ready(study: Study, results: Results, job: Job, untuned: bool) -> bool:
    """Whether what a job starts from is there."""
    if job.kind == ADHERENCE:
        return job.trained.kind == MEASURE or results.has(job.trained)
    return rate_of(study, results, job, untuned) is not None


def work(
    study: Study,
    jobs: list[Job],
    claims: Claims,
    deadline: float,
    run: Callable[[Job, float], float],
    *,
    untuned: bool = False,
    name: str = "",
) -> None:
    """Work jobs off, in their order, until none is left that can end before `deadline` (`time.time()`).

    run: does one job at a rate, writes its result and returns what is said of it. A job that fails is told and left.
    """
    results, failures, last = Results(study.results), 0, ("", "")
    while failures < _FAILURES:
        left = [job for job in jobs if not claims.taken(job.name) and not results.has(job)]
        seconds, now = expected(study, results), time.time()
        fitting = [job for job in left if now + seconds(job) < deadline]
        able = [job for job in fitting if ready(study, results, job, untuned)]
        # A row that has just been compiled goes on, if it is among the next.
        able[:_NEAR] = sorted(able[:_NEAR], key=lambda job: (job.kind, job.row) != last)
        chosen = next((job for job in able if claims.take(job.name)), None)
        if chosen is None:
            if fitting and claims.under_way():
                time.sleep(1)
                continue
            break
        last = chosen.kind, chosen.row
        rate = rate_of(study, results, chosen, untuned)
        assert rate is not None
        started = time.monotonic()
        try:
            value = run(chosen, rate)
            say(f"{name}{chosen.name}: {value:.6g}, rate {rate:.1e}, {time.monotonic() - started:.0f} s")
            failures = 0
        except Exception as error:  # the others go on; the log has the rest
            traceback.print_exc(file=sys.stderr)
            say(f"{name}{chosen.name} failed: {error}")
            failures += 1
        finally:
            claims.end(chosen.name)
            gc.collect()  # what the job had on the card
    if failures >= _FAILURES:
        say(f"{name}stopped after {failures} failures one after the other; the log says why.")


def start(study: Study, jobs: list[Job], claims: Path, deadline: float, untuned: bool, number: int) -> None:
    """The work of worker `number` in a process of its own, on the card that it sees."""
    from t3.cli import quiet_libraries

    from .sampling import sample
    from .training import Trainer

    quiet_libraries()
    results = Results(study.results)
    trainer = Trainer(study, study.folder / "work")
    device = device_of(study)

    def run(job: Job, rate: float) -> float:
        if job.kind == ADHERENCE:
            return sample(study, job, results, study.root / "model", device)
        return trainer.run(job, rate, not untuned, results)

    work(study, jobs, Claims(claims), deadline, run, untuned=untuned, name=f"worker {number}: ")


def device_of(study: Study) -> str:
    """The device the recipe names; adherence jobs use the same."""
    from ..files import read_toml

    return read_toml(study.recipe)["train"].get("device", "auto")
