"""Results on disk: for each job NAME.json, and NAME.npz with its numbers by clip. Both, or neither, are there.

    NAME.json            what was run and where, seconds, means
    NAME.npz             of velocity errors: `errors` [clips, draws], float16. Of adherence: one array [prompts] a word
    noise.KEY.npz        `sigma` [clips, draws]: the noise levels of the errors whose JSON names KEY

A file of several results is a zip of these. Results of several machines are merged by putting them in one folder.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t3.errors import T3Error
from t3.files import atomic_path

from .jobs import RUN, Job, fingerprint, kept, tries_of
from .settings import Row, Study


@dataclass
class Results:
    """A folder of results. What is there is looked up at every question: other processes write too."""

    folder: Path
    _read: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has(self, job: Job) -> bool:
        return self._path(job.name).exists()

    def get(self, job: Job) -> dict[str, Any] | None:
        """What a job's JSON says, or None while there is none."""
        return self._load(job.name) if job.name in self._read or self.has(job) else None

    def all(self) -> list[tuple[Job, dict[str, Any]]]:
        """Every job that has a result, with it, by name."""
        found = [self._load(name) for name in self.names()]
        return [(Job(**entry["job"]), entry) for entry in found]

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            self._read[name] = json.loads(self._path(name).read_text(encoding="utf-8"))
        return self._read[name]

    def names(self) -> list[str]:
        """The names of all jobs that have a result."""
        return sorted(path.stem for path in self.folder.glob("*.json") if not path.name.startswith("."))

    def arrays(self, job: Job) -> dict[str, np.ndarray]:
        """The numbers by clip. Raises `T3Error` where they are missing."""
        return _arrays(self.folder / f"{job.name}.npz")

    def sigma(self, job: Job) -> np.ndarray:
        """The noise levels `[clips, draws]` at which a job's velocity errors were measured."""
        found = self.get(job)
        assert found is not None, f"{job.name} has no result"
        return _arrays(self.folder / f"noise.{found['noise']}.npz")["sigma"]

    def put(
        self, job: Job, found: dict[str, Any], arrays: dict[str, np.ndarray], sigma: np.ndarray | None = None
    ) -> None:
        """Write a result; complete once its JSON is there. `found` may hold anything that JSON can."""
        from dataclasses import asdict

        self.folder.mkdir(parents=True, exist_ok=True)
        if sigma is not None:
            noise = self.folder / f"noise.{found['noise']}.npz"
            if not noise.exists():
                with atomic_path(noise, overwrite=True) as temp:
                    np.savez_compressed(temp, sigma=sigma.astype(np.float32))
        with atomic_path(self.folder / f"{job.name}.npz", overwrite=True) as temp:
            np.savez_compressed(temp, **arrays)  # type: ignore[arg-type]
        with atomic_path(self._path(job.name), overwrite=True) as temp:
            temp.write_text(json.dumps({"job": asdict(job), **found}) + "\n", encoding="utf-8")

    def rate(self, study: Study, row: Row) -> float | None:
        """The rate with the least error of a row's tries, or None until all of them are there."""
        errors = self.tries(study, row)
        if len(errors) < len(row.rates):
            return None
        best = min(errors, key=lambda rate: errors[rate])
        return best if math.isfinite(errors[best]) else None

    def tries(self, study: Study, row: Row) -> dict[float, float]:
        """The error of each rate that was tried; infinite where training went astray."""
        found = {job.rate: self.get(job) for job in tries_of(study, row)}
        return {rate: math.inf if r["astray"] else r["mean"] for rate, r in found.items() if r is not None}

    def set_aside(self, study: Study) -> list[str]:
        """Move results of other settings, or of another dense model, with the weights of those runs into folders
        called `former` beside them; their names. Raises `T3Error` where the dense model is not here to tell.
        """
        models: set[str] = {entry["dense"] for _, entry in self.all() if entry.get("dense")}
        if study.dense is None and len(models) > 1:
            raise T3Error(
                f"results in {self.folder} start from {len(models)} dense models ({', '.join(sorted(models))}). Put "
                f"the right one where {study.recipe} says: those of the others are then set aside."
            )
        aside = []
        for job, entry in self.all():
            row = study.rows.get(job.row)
            same = row is not None and row.plan == job.plan and entry["made"] == fingerprint(study, job)
            if same and entry.get("dense") in (None, study.dense or entry["dense"]):
                continue
            files = [self._path(job.name), self.folder / f"{job.name}.npz"]
            files += kept(study, job) if row is not None and job.kind == RUN else []
            for path in files:  # the JSON first: without it there is no result
                if path.exists():
                    (path.parent / "former").mkdir(exist_ok=True)
                    path.replace(path.parent / "former" / path.name)
            del self._read[job.name]
            aside.append(job.name)
        return aside

    def pack(self, archive: Path) -> int:
        """Put all results into one zip file; how many jobs. A result that is being written is left for next time."""
        complete = self.names()
        archive.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(archive, overwrite=True) as temp, zipfile.ZipFile(temp, "w", zipfile.ZIP_DEFLATED) as file:
            for noise in sorted(self.folder.glob("noise.*.npz")):  # a leading dot would be a file half written
                file.write(noise, noise.name)
            for name in complete:
                for ending in (".npz", ".json"):
                    file.write(self.folder / f"{name}{ending}", f"{name}{ending}")
        return len(complete)

    def merge(self, archives: Iterable[Path]) -> int:
        """Take in results from zip files or folders; how many were new. A result that is there stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = 0
        for source in archives:
            for name, content in _entries(source):
                # Arrays before JSON, which says that a result is complete.
                if not (self.folder / name).exists():
                    with atomic_path(self.folder / name, overwrite=True) as temp:
                        temp.write_bytes(content)
                    new += name.endswith(".json")
        return new

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _entries(source: Path) -> Iterable[tuple[str, bytes]]:
    """Names and contents of the files of results in a zip file or a folder, JSON last."""
    if source.is_dir():
        paths = [path for path in sorted(source.iterdir()) if path.suffix in (".npz", ".json")]
        for path in sorted(paths, key=lambda path: path.suffix == ".json"):
            yield path.name, path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as file:
            names = [name for name in file.namelist() if Path(name).name == name and name.endswith((".npz", ".json"))]
            for name in sorted(names, key=lambda name: name.endswith(".json")):
                yield name, file.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise T3Error(f"{source} holds no results: {error}.") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise T3Error(
            f"{path} is missing or damaged: {error}. Remove the JSON beside it and run the job again."
        ) from None
