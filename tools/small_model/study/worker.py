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
from .jobs import ADHERENCE, MEASURE, RUN, TUNE, Job, kept, tries_of
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


def expected(study: Study, results: Results) -> Callable[[Job, bool], float]:
    """How many seconds a job will take, as a function of it and of whether its row has just been run by this process:
    its steps, and what jobs like it took beside theirs."""
    training = MEASURE, TUNE, RUN
    starts: dict[str, list[float]] = {}
    rests: dict[tuple[str, int], dict[str, list[float]]] = {}
    for job, found in results.all():
        start = found.get("start_seconds", 0.0)
        rest = found["wall_seconds"] - found.get("training_seconds", 0.0) - start
        if job.kind in training:
            starts.setdefault(job.row, []).append(start)
        rests.setdefault((job.kind, job.steps), {}).setdefault(job.row, []).append(rest)
    every = [start for some in starts.values() for start in some]

    def seconds(job: Job, warm: bool = False) -> float:
        steps = study.seconds(job.fraction) if job.kind in (TUNE, RUN) else 0.0
        alike = rests.get((job.kind, job.steps))
        if alike is None:
            return steps + study.overhead_seconds
        rest = max(alike.get(job.row) or [value for some in alike.values() for value in some])
        start = 0.0
        if job.kind in training:
            # The longest start had everything to compile, as a process new to the row has, whatever job was its first.
            own = starts.get(job.row)
            start = min(own) if own and warm else max(own or every)
        return steps + _MARGIN * (start + rest)

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
    if job.kind == ADHERENCE and job.trained.kind == RUN:
        return results.has(job.trained) and all(path.exists() for path in kept(study, job.trained))
    return job.kind == ADHERENCE or rate_of(study, results, job, untuned) is not None


def in_turn(jobs: list[Job], last: tuple[str, str]) -> list[Job]:
    """Jobs in the order in which a process takes them: a row that it has just compiled goes on, if it is among the
    next."""
    return [*sorted(jobs[:_NEAR], key=lambda job: (job.kind, job.row) != last), *jobs[_NEAR:]]


def foreseen(study: Study, jobs: list[Job], results: Results, workers: int, seconds: float, untuned: bool) -> list[Job]:
    """The jobs that so many processes will do in so many seconds, as far as jobs like them tell."""
    left, length = [job for job in jobs if not results.has(job)], expected(study, results)
    ends: dict[str, float] = {}
    free, lasts = [0.0] * workers, [("", "")] * workers

    def since(job: Job) -> float | None:
        """When a job can start; None for never."""
        if ready(study, results, job, untuned):
            return 0.0
        if job.kind == ADHERENCE:
            needed = [job.trained]
        else:
            tries = tries_of(study, study.row(job.row))
            needed = [other for other in tries if not results.has(other)]
            if not needed:
                return None
        return max(ends[other.name] for other in needed) if all(other.name in ends for other in needed) else None

    while free:
        number = min(range(len(free)), key=lambda i: free[i])
        now, last = free[number], lasts[number]
        open_ = [job for job in left if job.name not in ends]
        fitting = [job for job in open_ if now + length(job, job.row == last[1]) < seconds]
        able = in_turn([job for job in fitting if (at := since(job)) is not None and at <= now], last)
        if able:
            free[number] = ends[able[0].name] = now + length(able[0], able[0].row == last[1])
            lasts[number] = able[0].kind, able[0].row
        elif fitting and any(end > now for end in ends.values()):
            free[number] = min(end for end in ends.values() if end > now)
        else:
            del free[number], lasts[number]
    return [job for job in left if job.name in ends]


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
        fitting = [job for job in left if now + seconds(job, job.row == last[1]) < deadline]
        able = in_turn([job for job in fitting if ready(study, results, job, untuned)], last)
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
