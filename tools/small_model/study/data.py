"""What the jobs start from: the pipeline folder, and encoded clips in parts that several cards make at once."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from t3.errors import T3Error
from t3.retrofit.shards import EMPTY_TEXT, INDEX

from ..files import read_toml, say
from .settings import Encoded, Study
from .worker import Claims


def prepare(study: Study) -> None:
    """Make `root`/model from the text encoder and the VAE in `root`, or else from those that were published.

    Raises `T3Error` where the dense model is missing.
    """
    dense = Path(read_toml(study.recipe)["model"]["dit"][0])
    if not dense.exists():
        raise T3Error(f"{dense} is missing: the dense model that all rows start from. Train it, or bring it here.")
    from ..init_dit import prepare_folder

    prepare_folder(study.root)


def parts(study: Study) -> list[tuple[str, int]]:
    """All parts that are missing, as `(data set, number)`: those of the largest sets first."""
    missing = [name for name in study.data if not (study.shards / name / INDEX).exists()]
    missing.sort(key=lambda name: -study.data[name].clips)
    return [(name, i) for name in missing for i in range(study.parts) if not part_folder(study, name, i).exists()]


def part_folder(study: Study, name: str, number: int) -> Path:
    return study.shards / "parts" / f"{name}-{number}"


def part_arguments(study: Study, entry: Encoded, number: int, out: Path, device: str) -> list[str]:
    """The command line of `tools.small_model.encode` for one part of a data set."""
    start = entry.clips * number // study.parts
    asked = {
        "model": study.root / "model", "out": out, "size": entry.size, "split": entry.split, "start": start,
        "clips": entry.clips * (number + 1) // study.parts - start, "frames": entry.frames, "batch": entry.batch,
    }  # fmt: skip
    if device != "auto":
        asked["device"] = device
    return [text for key, value in asked.items() for text in (f"--{key}", str(value))]


def encode_parts(study: Study, claims: Claims, deadline: float, device: str) -> None:
    """Make parts that no other process makes, until all are made or the time is over. A part is whole or not there."""
    from ..encode import main as encode

    slowest = 0.0
    for name, number in parts(study):
        folder, started = part_folder(study, name, number), time.time()
        if started + slowest > deadline:
            return
        if not claims.take(folder.name) or folder.exists():
            continue
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        encode(part_arguments(study, study.data[name], number, partial, device))
        partial.rename(folder)
        slowest = max(slowest, time.time() - started)


def join(study: Study) -> list[str]:
    """Put the parts of every data set that has all of them together; the names of those that lack some."""
    lacking = []
    for name in study.data:
        target = study.shards / name
        if (target / INDEX).exists():
            continue
        folders = [part_folder(study, name, i) for i in range(study.parts)]
        if not all(folder.exists() for folder in folders):
            lacking.append(name)
            continue
        _join(folders, target)
        say(f"{target}: {study.data[name].clips} clips")
    return lacking


def _join(folders: list[Path], target: Path) -> None:
    """Move the shards of `folders` into one data set; it is there once its index is."""
    target.mkdir(parents=True, exist_ok=True)
    indices = [json.loads((folder / INDEX).read_text(encoding="utf-8")) for folder in folders]
    joined = {**indices[0], "shards": [], "skipped": []}
    for folder, index in zip(folders, indices, strict=True):
        for shard in index["shards"]:
            name = f"clips-{len(joined['shards']):05}.safetensors"
            # Linked, so that a join that is cut off can be done again.
            (target / name).unlink(missing_ok=True)
            (target / name).hardlink_to(folder / shard["file"])
            joined["shards"].append({**shard, "file": name})
        joined["skipped"] += index["skipped"]
    shutil.copy(folders[0] / EMPTY_TEXT, target / EMPTY_TEXT)
    temp = target / f"{INDEX}.partial"
    temp.write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    temp.rename(target / INDEX)
    for folder in folders:
        shutil.rmtree(folder)
