"""A training job: its phases one after the other by t3.retrofit's own loop, and the error of what comes out."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t3.errors import T3Error
from t3.retrofit import model, validation
from t3.retrofit.config import Config
from t3.retrofit.data import Clips, Pool, open_clips
from t3.retrofit.loop import Loop
from t3.retrofit.session import make_accelerator, start

from .configs import configs, result
from .jobs import RUN, Job, fingerprint, kept
from .results import Results
from .settings import Study


class StudyLoop(Loop):
    """The loop without checkpoints, and with one measurement: at the end of the last phase."""

    def __init__(self, session, folder: Path, started: float, measures: bool) -> None:
        super().__init__(session, folder, started)
        self.started, self.began = started, 0.0
        self.measures = measures
        self.found: validation.Measured | None = None

    def run_stage(self, stage) -> bool:
        self.began = self.began or time.monotonic()
        return super().run_stage(stage)

    def save(self) -> int:
        return self.at.step

    def write(self) -> None:
        self.finish.write()  # a failure ends the job

    def validate(self, stage: str) -> None:
        trains = any(stage.bounded for stage in self.config.stages)
        if self.measures and stage == ("end" if trains else "start"):
            with self.finish.timed("validation"):
                self.found = validation.measure(self.session, self.config.validation)


@dataclass
class Trainer:
    """Runs training jobs in this process; clips stay on the device from job to job.

    folder: for what a job needs while it runs; emptied after it. compiled: the row that blocks are compiled for.
    """

    study: Study
    folder: Path
    compiled: str = ""
    _pools: dict[Any, list[Pool]] = field(default_factory=dict)

    def run(self, job: Job, rate: float, tuned: bool, results: Results) -> float:
        """Train, measure, and write the result; returns the error. Raises as t3.retrofit does."""
        started = time.monotonic()
        made = configs(self.study, job, rate, self.folder)
        if job.row != self.compiled:
            # Jobs of one row share compiled code; that of other rows would be looked through at every block.
            torch._dynamo.reset()
            self.compiled = job.row
        try:
            loops, astray = self._phases(made)
            found = self._describe(job, made, loops, rate, tuned, started)
            found |= {"made": fingerprint(self.study, job), "dense": self.study.dense}
            found |= {"astray": True, "mean": None, "summary": None}
            arrays, sigma = {}, None
            ended = None if astray else loops[-1].found
            assert astray or ended is not None, "the last phase ended without having been measured"
            if ended is not None and np.isfinite(ended.errors).all():
                errors, sigma = table(ended, made[-1].validation.draws)
                arrays = {"errors": errors.astype(np.float16)}
                found |= {"astray": False, "mean": float(errors.mean()), "summary": ended.summary}
                found["noise"] = noise_key(made[-1], len(errors))
                if job.kind == RUN:
                    self._keep(job, made)
            results.put(job, found, arrays, sigma)
            return math.inf if found["mean"] is None else found["mean"]
        finally:
            for config in made:
                shutil.rmtree(config.output.folder, ignore_errors=True)

    def _phases(self, made: list[Config]) -> tuple[list[StudyLoop], bool]:
        """The loops of all phases, run; and whether the loss ceased to be finite on the way."""
        loops: list[StudyLoop] = []
        for config in made:
            folder = Path(config.output.folder)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            began = time.monotonic()
            found = model.find(config.model)
            session = start(config, found, self._clips(config, found.config), make_accelerator(config))
            loop = StudyLoop(session, folder, began, config is made[-1])
            loops.append(loop)
            try:
                status = loop.run()
            except T3Error as error:
                if "went astray" not in str(error):
                    raise
                return loops, True
            if status:
                raise SystemExit(status)  # asked to end: what the job has done is dropped
        return loops, False

    def _clips(self, config: Config, transformer: dict[str, Any]) -> Clips:
        clips = open_clips(config.data, transformer, config.model.text_tokens)
        clips.pools = self._pools.setdefault((config.data.sets, config.model.text_tokens), clips.pools)
        return clips

    def _describe(self, job: Job, made: list[Config], loops: list[StudyLoop], rate, tuned, started) -> dict[str, Any]:
        device = loops[-1].session.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        steps = [loop.at.step for loop in loops]
        return {
            "rate": rate,
            "tuned": tuned,
            "budget_seconds": self.study.seconds(job.fraction),
            "training_seconds": round(sum(loop.at.training for loop in loops), 3),
            "start_seconds": round(sum(loop.began - loop.started for loop in loops), 2),
            "validation_seconds": round(loops[-1].finish.took.get("validation", 0.0), 2),
            "wall_seconds": round(time.monotonic() - started, 2),
            "steps": steps,
            # A run that goes astray has fewer phases than it was to have.
            "clips": sum(count * config.train.batch for count, config in zip(steps, made, strict=False)),
            "trained": sum(p.numel() for p in loops[-1].session.parameters),
            "device": name,
            "torch": torch.__version__,
            "compile": [config.train.compile for config in made],
        }

    def _keep(self, job: Job, made: list[Config]) -> None:
        """Put the weights where adherence jobs and the archive find them; of two phases, the first one's too."""
        self.study.weights.mkdir(parents=True, exist_ok=True)
        for config, path in zip(made, kept(self.study, job), strict=True):
            shutil.move(result(config), path)


def table(found: validation.Measured, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and noise levels of a measurement as arrays `[clips, draws]`."""
    # Points come by clips, and by draws within a clip.
    return (
        np.array(found.errors).reshape(-1, draws),
        np.array([point.sigma for point in found.points]).reshape(-1, draws),
    )


def noise_key(config: Config, clips: int) -> str:
    """A name for the noise of a measurement: what it depends on."""
    asked = config.validation
    folder = Path(config.data.validation[0]).name
    return f"{folder}-{clips}x{asked.draws}of{asked.levels}-shift{asked.shift:g}-seed{asked.seed}"
