"""What the results there are have to say, by row and budget; None wherever a result is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from t3.errors import T3Error

from ..files import TRAINED
from .jobs import ADHERENCE, MEASURE, RUN, TUNE, Job
from .results import Results
from .settings import Study
from .statistics import Curve, Estimate, closure_difference, interpolated, share_difference

CONTROL, UNTUNED, FULL, DENSE_ROW, PLAIN = "control", "untuned", "full", "dense", "lora-11"


@dataclass
class Evidence:
    """Results as arrays and estimates. Everything is looked up once."""

    study: Study
    results: Results
    _curves: dict[Any, Curve | None] = field(default_factory=dict)

    @cached_property
    def jobs(self) -> dict[str, tuple[Job, dict[str, Any]]]:
        return {job.name: (job, found) for job, found in self.results.all()}

    def job(self, kind: str, row: str, fraction: float = 0.0, seed: int = 0) -> Job:
        return Job(kind, row, self.study.row(row).plan, fraction, seed)

    def found(self, job: Job) -> dict[str, Any] | None:
        entry = self.jobs.get(job.name)
        return entry[1] if entry else None

    def runs(self, row: str, fraction: float) -> dict[int, dict[str, Any]]:
        """Results of a row's runs at a budget by seed, those that went astray left out."""
        entries = [entry for entry in self.jobs.values() if entry[0].kind == RUN]
        found = {j.seed: f for j, f in entries if (j.row, j.plan, j.fraction) == self._key(row, fraction)}
        return {seed: entry for seed, entry in sorted(found.items()) if not entry["astray"]}

    def astray(self, row: str) -> int:
        """How many of a row's runs went astray."""
        return sum(j.kind == RUN and j.row == row and f["astray"] for j, f in self.jobs.values())

    def _key(self, row: str, fraction: float) -> tuple[str, str, float]:
        return row, self.study.row(row).plan, fraction

    def errors(self, job: Job) -> np.ndarray:
        return self.results.arrays(job)["errors"].astype(np.float64)

    def curve(self, row: str, fraction: float, seeds: tuple[int, ...] | None = None) -> Curve | None:
        """A row at a budget beside the control and its un-tuned model; by default at all seeds that both have."""
        reference = self.job(MEASURE, self.study.row(row).reference)
        if seeds is None:
            seeds = tuple(sorted(set(self.runs(row, fraction)) & set(self.runs(CONTROL, fraction))))
        if not seeds or self.found(reference) is None:
            return None
        key = row, fraction, seeds
        if key not in self._curves:
            jobs = [[self.job(RUN, name, fraction, seed) for seed in seeds] for name in (row, CONTROL)]
            everything = [*jobs[0], *jobs[1], reference]
            noises = {entry["noise"] for job in everything if (entry := self.found(job)) is not None}
            if len(noises) > 1:
                raise T3Error(f"{row} at {fraction}: measured with different noise: {', '.join(sorted(noises))}.")
            both = [np.stack([self.errors(job) for job in some]) for some in jobs]
            sigma = self.results.sigma(reference).astype(np.float64)
            self._curves[key] = Curve(both[0], both[1], self.errors(reference)[None], sigma)
        return self._curves[key]

    def closure(self, row: str, fraction: float, band: str = "whole") -> Estimate | None:
        curve = self.curve(row, fraction)
        return curve.closure(band) if curve else None

    def ahead(self, one: str, other: str, fraction: float) -> Estimate | None:
        """Closure of one row less that of another at a budget, at the seeds that both and the control have."""
        seeds = set(self.runs(one, fraction)) & set(self.runs(other, fraction)) & set(self.runs(CONTROL, fraction))
        first, second = (self.curve(row, fraction, tuple(sorted(seeds))) for row in (one, other))
        return closure_difference(first, second) if first and second else None

    def largest(self, *rows: str) -> float | None:
        """The largest budget at which all of these rows can be compared."""
        return max((f for f in self.study.fractions if all(self.curve(row, f) for row in rows)), default=None)

    def error(self, row: str, fraction: float) -> float | None:
        """The mean error over all seeds."""
        runs = self.runs(row, fraction)
        return float(np.mean([entry["mean"] for entry in runs.values()])) if runs else None

    def rates(self, row: str) -> dict[float, float]:
        """The error of each rate that was tried."""
        return self.results.tries(self.study, self.study.row(row))

    def at_equal_samples(self, row: str, fraction: float) -> tuple[float, float | None] | None:
        """The row's error, and the control's at as many training clips (None where it saw never so few or so many)."""
        runs = self.runs(row, fraction)
        if not runs:
            return None
        clips = _mean(runs, "clips")
        points: list[tuple[float, float]] = []
        for other in self.study.fractions:
            control = self.runs(CONTROL, other)
            if runs.keys() <= control.keys():  # by the same seeds, or they would be compared with others' luck
                same = {seed: control[seed] for seed in runs}
                points.append((_mean(same, "clips"), _mean(same, "mean")))
        return _mean(runs, "mean"), interpolated(points, clips)

    # --- sampled clips --------------------------------------------------------------------------------------------

    def sampled(self, row: str, fraction: float, steps: int) -> dict[tuple[int, int], Job]:
        """Adherence jobs that are done, by training seed and noise seed."""
        asked = (*self._key(row, fraction), steps)
        jobs = [job for job, _ in self.jobs.values() if job.kind == ADHERENCE]
        return {(j.seed, j.noise): j for j in jobs if (j.row, j.plan, j.fraction, j.steps) == asked}

    def shares(self, row: str, fraction: float, steps: int) -> dict[str, float] | None:
        """Percent with all that was asked for, percent in agreement, and seconds of sampling a clip."""
        jobs = self.sampled(row, fraction, steps).values()
        entries = [entry for job in jobs if (entry := self.found(job)) is not None]
        if not entries:
            return None
        return {name: float(np.mean([e[name] for e in entries])) for name in ("all", "agreement", "sampling_seconds")}

    def share_ahead(
        self, one: tuple[str, float, int], other: tuple[str, float, int], word: str
    ) -> tuple[Estimate, int] | None:
        """How much oftener one `(row, fraction, steps)` is right than another, and at how many noise seeds.

        Training seeds are paired where both were trained.
        """
        first, second = self.sampled(*one), self.sampled(*other)
        pairs = []
        for (seed, noise), job in sorted(first.items()):
            partner = second.get((seed if other[1] else 0, noise))
            if partner is not None:
                pairs.append([self.results.arrays(each)[word].astype(bool) for each in (job, partner)])
        if not pairs:
            return None
        return share_difference(*(np.stack(some) for some in zip(*pairs, strict=True))), len(pairs)

    # --- gates ----------------------------------------------------------------------------------------------------

    def vae_psnr(self) -> float | None:
        """Of whole held-out clips at the high size, in dB."""
        return _read(TRAINED / "folded" / "vae.json", "psnr after", "high mean")

    def detector(self) -> float | None:
        """Percent of real clips of which everything is told right."""
        return _read(TRAINED / "detector.json", "real", "all")

    def untuned_loss(self, row: str) -> float | None:
        """By how many percent the error of a dense model's weights rises under an un-tuned row's windows."""
        dense, untuned = (self.found(self.job(MEASURE, name)) for name in (DENSE_ROW, row))
        return None if dense is None or untuned is None else 100 * (untuned["mean"] / dense["mean"] - 1)

    def untuned_drop(self, row: str) -> tuple[Estimate, int] | None:
        """By how many points adherence falls under an un-tuned row's windows, and at how many noise seeds."""
        steps = self.study.adherence.steps
        return self.share_ahead((DENSE_ROW, 0.0, steps), (row, 0.0, steps), "all")

    def count(self, kind: str) -> int:
        return sum(job.kind == kind for job, _ in self.jobs.values())

    @property
    def kinds(self) -> dict[str, int]:
        return {kind: self.count(kind) for kind in (MEASURE, TUNE, RUN, ADHERENCE)}


def _mean(runs: dict[int, dict[str, Any]], name: str) -> float:
    return float(np.mean([entry[name] for entry in runs.values()]))


def _read(path, *keys: str) -> float | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        found = found[key]
    return float(found)
