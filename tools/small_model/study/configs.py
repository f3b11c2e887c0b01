"""A job as configs of t3.retrofit: the recipe, the row's changes, and the job's plan, rate, seed and seconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from t3.retrofit.config import Config, parse_config

from ..files import read_toml
from .jobs import MEASURE, TUNE, Job
from .settings import Study


def configs(study: Study, job: Job, rate: float, folder: Path) -> list[Config]:
    """One config for each phase of the job's row, checked. Phase i writes into `folder`/NAME-i.

    A phase after the first starts from the file that the one before it writes. Raises `T3Error`.
    """
    row = study.row(job.row)
    made: list[Config] = []
    recipe = read_toml(study.recipe)
    measured = study.tuning if job.kind == TUNE else study.validation
    for number, phase in enumerate(row.phases, 1):
        content = copy.deepcopy(recipe)
        for table, changes in phase.tables.items():
            content[table] = {**content.get(table, {}), **changes}
        if number > 1:
            content["model"]["dit"] = [str(result(made[-1]))]
        content["model"]["plan"] = study.plan_file(row.plan)
        content["train"]["seed"] = job.seed
        if study.compile is not None and "compile" not in phase.tables.get("train", {}):
            content["train"]["compile"] = study.compile
        content["data"]["validation"] = [str(study.shards / measured.folder)]
        content["validation"] = {"clips": 0, "levels": measured.levels, "draws": measured.draws}
        content["output"]["folder"] = str(folder / f"{job.name}-{number}")
        if job.kind == MEASURE:
            content["stages"] = [{"steps": 0}]
        else:
            content["schedule"]["lr"] = rate
            seconds = study.seconds(job.fraction) * phase.share
            content["stages"] = [_stage(stage, seconds) for stage in phase.stages]
        made.append(parse_config(to_toml(content)))
    return made


def result(config: Config) -> Path:
    """The file that a run by this config writes."""
    folder = Path(config.output.folder)
    return folder / f"{folder.name}{'' if config.trainable.what == 'everything' else '-lora'}.safetensors"


def _stage(stage: dict[str, Any], seconds: float) -> dict[str, Any]:
    rest = {key: value for key, value in stage.items() if key != "share"}
    return {**rest, "training_seconds": seconds * stage.get("share", 1.0)}


def to_toml(content: dict[str, Any]) -> str:
    """TOML text of a config as plain data: what is no table comes first, a table's values stand on one line each."""
    lines = [f"{key} = {_value(value)}" for key, value in content.items() if not isinstance(value, dict)]
    for key, table in content.items():
        if isinstance(table, dict):
            lines += [f"[{key}]", *(f"{name} = {_value(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
