"""An adherence job: clips sampled from captions with one noise seed, judged, and timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t3.errors import T3Error

from ..detector import detect
from ..evaluate import jobs as prompts
from ..evaluate import load_engine, options, row, sampled
from ..files import read_toml
from .jobs import RUN, Job, fingerprint, kept
from .results import Results
from .settings import DENSE, Study


def weights(study: Study, job: Job) -> dict[str, Any]:
    """What `load_engine` is told of the weights: the model's own, or those of the run that the job is about.

    Raises `T3Error` where they are not on this machine, or belong to an operator that no plan says.
    """
    base = read_toml(study.recipe)["model"]["dit"][0]
    plan = study.plan_file(job.plan)
    trained, chosen = job.trained, study.row(job.row)
    if trained.kind != RUN:
        return {"dit": base, "t3-weights": None, "plan": plan}
    if chosen.one_kind:
        raise T3Error(f"row {job.row!r} has one kind of windows alone, which the sampler does not run.")
    files = kept(study, trained)
    if missing := [path for path in files if not path.exists()]:
        raise T3Error(f"{missing[0]} is not here: run the job {trained.name} on this machine first.")
    if not chosen.lora:
        return {"dit": str(files[-1]), "t3-weights": None, "plan": DENSE if job.plan == DENSE else "auto"}
    return {"dit": str(files[-2]) if len(files) > 1 else base, "t3-weights": str(files[-1]), "plan": "auto"}


def sample(study: Study, job: Job, results: Results, model: Path, device: str) -> float:
    """Sample, judge and write the result; returns the percentage with all that was asked for. Raises `T3Error`."""
    started, asked = time.monotonic(), study.adherence
    asking = {
        "model": model, "out": "-", "size": asked.size, "frames": asked.frames, "steps": job.steps, "cfg": asked.cfg,
        "batch": asked.batch, "device": device, **weights(study, job),
    }  # fmt: skip
    args = options().parse_args([f"--{name}={value}" for name, value in asking.items() if value is not None])
    engine = load_engine(args)
    seconds = _timed(engine)
    everything = prompts("test", asked.prompts, asked.seeds, asked.frames)
    work = everything[job.noise * asked.prompts :][: asked.prompts]
    rows = []
    for some, video in sampled(engine, work, args):
        for (number, scene, _, seed), clip in zip(some, video, strict=True):
            rows.append(row(number, seed, scene, detect(clip), asked.frames))
    arrays = {name: np.array([found[name] for found in rows]) for name in ("all", "agreement")}
    for name in sorted({name for found in rows for name in found["right"]}):
        # -1: the caption does not say.
        arrays[name] = np.array([int(found["right"].get(name, -1)) for found in rows], dtype=np.int8)
    # The first batch warms up, the last one may be smaller.
    paced = sorted(seconds[1:-1] or seconds)
    found = {
        "made": fingerprint(study, job),
        "dense": study.dense,
        "all": 100 * float(arrays["all"].mean()),
        "agreement": 100 * float(arrays["agreement"].mean()),
        "sampling_seconds": round(paced[len(paced) // 2] / min(asked.batch, asked.prompts), 5),  # of one clip
        "wall_seconds": round(time.monotonic() - started, 2),
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    results.put(job, found, arrays)
    return 100 * float(arrays["all"].mean())


def _timed(engine) -> list[float]:
    """Seconds of every batch that the engine samples from now on."""
    seconds: list[float] = []
    plain = engine.sample_batch

    def sample_batch(clips):
        start = time.perf_counter()
        latents = plain(clips)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return latents

    engine.sample_batch = sample_batch
    return seconds
