"""The clips of a prompt file that this process takes on, beside others that work through the same file."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .claims import Shared, claim_path
from .prompts import is_output

if TYPE_CHECKING:
    from .jobs import Job
    from .parallel.team import Team


class Batch:
    """Jobs that are claimed one by one (`t3.claims`), so that fast processes do more and none is done twice.

    Every process that runs the same command makes one. A clip whose files are there is done; with `--overwrite`, one
    whose files were written after this was made.
    """

    def __init__(self, jobs: list[Job], args: argparse.Namespace) -> None:
        self.jobs = jobs
        self._claimed = args.prompts is not None
        self._since = time.time() if args.overwrite else None

    def of_team(self, team: Team) -> Generator[Job, None, None]:
        """The jobs of this team, on all its ranks: its leader claims each when the one before is done. What others
        have in hand is waited for: at the end every job was this team's or is finished.

        To be closed if it is not exhausted: that gives the last claim back.
        """
        if not self._claimed:
            yield from self.jobs
            return
        if not team.is_leader:
            by_name = {job.name: job for job in self.jobs}
            while (name := team.share()) is not None:
                yield by_name[name]
            return
        for job, claim in Shared(self.jobs, _output, self.is_finished):
            with claim:
                team.share(job.name)
                yield job
        team.share(None)

    def is_finished(self, job: Job) -> bool:
        """Whether all that a job makes is on disk."""
        return all(self._is_there(path) for path in (job.out, job.latents) if path is not None)

    def _is_there(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return is_output(path) and (self._since is None or path.stat().st_mtime >= self._since)
        return False

    def outcome(self, results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """What became of all clips: a result for each that is settled; the names of those in other hands.

        results: of all ranks. A clip that failed on one and was made on another is made. Of what other processes made
        of a prompt file it is known that it is there; what nobody holds and is not there has failed elsewhere.
        """
        found = {result["name"]: result for result in sorted(results, key=lambda result: result["status"] == "done")}
        clips, elsewhere = [], []
        for job in self.jobs:
            # A file where one prompt's clip was to be may be anybody's.
            made_elsewhere = self._claimed and self.is_finished(job)
            if job.name in found and (found[job.name]["status"] == "done" or not made_elsewhere):
                clips.append(found[job.name])
            elif made_elsewhere:
                clips.append({"name": job.name, "status": "done", "by": "another process", **_files(job)})
            elif self._claimed and claim_path(_output(job)).exists():
                elsewhere.append(job.name)
            else:
                error = "not made: another process gave it back, or the run ended before it. Run again."
                clips.append({"name": job.name, "status": "failed", "error": error})
        return clips, elsewhere


def _output(job: Job) -> Path:
    path = job.out or job.latents
    assert path is not None
    return path


def _files(job: Job) -> dict[str, str]:
    named = {"out": job.out, "latents": job.latents}
    return {name: str(path) for name, path in named.items() if path is not None}
