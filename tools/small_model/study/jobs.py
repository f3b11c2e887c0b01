"""Jobs: what is run, one at a time, each with a name that says what it is; and which of them a study has, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t3.errors import T3Error

from ..files import read_toml
from .settings import DENSE, Row, Study

MEASURE, TUNE, RUN, ADHERENCE = KINDS = ("measure", "tune", "run", "adherence")


@dataclass(frozen=True)
class Job:
    """One job. fraction: its budget as part of pre-training. rate: of a "tune" job; others take the tuned one.

    seed: of training. noise, steps: of an "adherence" job, the sampling seed and the sampler's steps.
    """

    kind: str
    row: str
    plan: str
    fraction: float = 0.0
    seed: int = 0
    rate: float = 0.0
    noise: int = 0
    steps: int = 0

    @property
    def name(self) -> str:
        """Unique, and good as a file's name."""
        parts = [self.kind, self.row, self.plan]
        if self.fraction:
            parts += [f"f{round(1000 * self.fraction):03}", f"s{self.seed}"]
        if self.kind == TUNE:
            parts.append(f"r{self.rate:.1e}")
        if self.kind == ADHERENCE:
            parts += [f"n{self.noise}", f"{self.steps}steps"]
        return ".".join(parts)

    @property
    def trained(self) -> Job:
        """Of an adherence job: the job whose weights are sampled."""
        kind = RUN if self.fraction else MEASURE
        return Job(kind, self.row, self.plan, self.fraction, self.seed)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `to_json` writes."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Choice:
    """Which jobs are wanted. Empty is the study's own choice: all kinds, all rows, each row's fractions and seeds."""

    kinds: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


def listed(study: Study, choice: Choice = Choice()) -> list[Job]:
    """The jobs of a study, most important first. Raises `T3Error` for a kind or a row that there is not."""
    for kind in choice.kinds:
        if kind not in KINDS:
            raise T3Error(f"there is no kind of job {kind!r}; they are {', '.join(KINDS)}.")
    rows = [study.row(name) for name in choice.rows] or list(study.rows.values())
    kinds = choice.kinds or KINDS
    found: list[tuple[tuple, Job]] = []
    for place, row in enumerate(rows):
        if MEASURE in kinds and row.measure:
            found.append(((0, place), Job(MEASURE, row.name, row.plan)))
        if TUNE in kinds and not row.measure:
            found += [((1, not row.deciding, place), job) for job in tries_of(study, row)]
        if RUN in kinds and not row.measure:
            found += [((2, _order(study, row, job), place), job) for job in _runs(study, row, choice)]
        if ADHERENCE in kinds and _is_sampled(study, row, choice):
            found += [
                ((3, job.noise, job.steps != study.adherence.steps, place), job) for job in _sampled(study, row, choice)
            ]
    return [job for _, job in sorted(found, key=lambda entry: entry[0])]


def tries_of(study: Study, row: Row) -> list[Job]:
    """The jobs that choose a row's learning rate."""
    return [Job(TUNE, row.name, row.plan, study.tune_fraction, rate=rate) for rate in row.rates]


def fingerprint(study: Study, job: Job) -> str:
    """A short hash of the settings that decide a job's result: no titles, no other tries, no places on a disk."""
    row, asked = study.row(job.row), study.adherence
    measured: Any = asdict(study.tuning if job.kind == TUNE else study.validation)
    if job.kind == ADHERENCE:
        measured = [asked.prompts, asked.size, asked.frames, asked.cfg]
    plan = None if row.plan == DENSE else study.plans[row.plan].to_json()
    data = {name: asdict(entry) for name, entry in study.data.items()}
    training = [asdict(phase) for phase in row.phases], study.seconds(job.fraction), data, study.parts
    recipe = {name: table for name, table in read_toml(study.recipe).items() if name != "output"}
    recipe["model"] = {name: value for name, value in recipe["model"].items() if name != "dit"}
    recipe["data"] = {name: value for name, value in recipe["data"].items() if name not in ("sets", "validation")}
    entry = [row.plan, plan, training, measured, recipe]
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def _runs(study: Study, row: Row, choice: Choice) -> Iterable[Job]:
    few = {study.first[0], *((study.adherence.fraction,) if row.name in study.adherence.rows else ())}
    fractions = choice.fractions or (study.fractions if row.deciding else sorted(few))
    return [
        Job(RUN, row.name, row.plan, fraction, seed)
        for fraction in fractions
        for seed in choice.seeds or _seeds(study, row, fraction)
    ]


def _seeds(study: Study, row: Row, fraction: float) -> tuple[int, ...]:
    all_of_them = row.deciding or (row.repeated and fraction == study.first[0])
    return study.seeds if all_of_them else study.seeds[:1]


def _order(study: Study, row: Row, job: Job) -> float:
    """The bars' fractions come first, the first seed before the others, rows that decide before those that do not."""
    first = study.first.index(job.fraction) if job.fraction in study.first else len(study.first)
    return first + 2 * (job.seed != study.seeds[0]) + (0.5 if not row.deciding else 0)


def _is_sampled(study: Study, row: Row, choice: Choice) -> bool:
    """Un-tuned models are sampled under every plan: the gates ask for it. Other rows where row and kind are named."""
    rows = study.adherence.rows
    asked = ADHERENCE in choice.kinds and bool(choice.rows) and not row.one_kind
    return asked or row.name in rows or (row.measure and row.like in rows)


def _sampled(study: Study, row: Row, choice: Choice) -> Iterable[Job]:
    asked = study.adherence
    fractions = (0.0,) if row.measure else choice.fractions or (asked.fraction,)
    seeds = choice.seeds or study.seeds[:1] if not row.measure else (0,)
    steps = (asked.steps, *(asked.few_steps if row.plan == DENSE and not row.measure else ()))
    return [
        Job(ADHERENCE, row.name, row.plan, fraction, seed, noise=noise, steps=count)
        for fraction in fractions
        for seed in seeds
        for noise in range(asked.seeds)
        for count in steps
    ]


def kept(study: Study, job: Job) -> list[Path]:
    """Where the weights of a "run" job's phases are kept: those of the last one under the job's name."""
    phases = len(study.row(job.row).phases)
    names = [f"{job.name}.phase-{number}" for number in range(1, phases)] + [job.name]
    return [study.weights / f"{name}.safetensors" for name in names]


def sampled_weights(study: Study, jobs: Iterable[Job]) -> dict[str, list[Path]]:
    """The weights that adherence jobs among these sample, by the name of the run that they are of."""
    trained = (job.trained for job in jobs if job.kind == ADHERENCE)
    return {job.name: kept(study, job) for job in trained if job.kind == RUN}


def training_seconds(study: Study, jobs: Collection[Job]) -> float:
    """GPU seconds of the steps of all these jobs together."""
    return sum(study.seconds(job.fraction) for job in jobs if job.kind in (TUNE, RUN))
