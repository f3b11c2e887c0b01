"""python -m tools.small_model.study COMMAND

list      jobs, in the order they are run, with what is done and the GPU seconds that are left
data      the pipeline folder and the encoded clips that all jobs start from
run       jobs, on one card or several, until the time is over; results go to OUT/study.zip as well
keep      the weights worth keeping, as files in a folder
report    tables, curves and verdicts from the results there are
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from t3.cli import run as guarded
from t3.errors import T3Error

from ..files import say
from .jobs import ADHERENCE, KINDS, RUN, TUNE, Choice, Job, listed, training_seconds
from .results import Results
from .settings import FILE, Study, read_study

_LAST = 15.0  # seconds of `run --seconds` that are kept for ending workers and writing the archive


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit status: 0, 1 (something failed or is missing), 2 (bad input), 130."""
    started = time.time()
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    return guarded("tools.small_model.study", lambda: _do(args, started), as_json=False)


def _do(args: argparse.Namespace, started: float) -> int:
    study = read_study(args.study)
    if getattr(args, "compile", None) is not None:
        study = dataclasses.replace(study, compile=args.compile)
    return args.do(args, study, started)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.small_model.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=FILE, help="another study.toml")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    lists = commands.add_parser("list")
    _add_choice(lists)
    lists.set_defaults(do=_list)

    data = commands.add_parser("data")
    data.add_argument("--workers", type=int, default=1, help="cards to use")
    data.add_argument("--seconds", type=float, default=540)
    data.set_defaults(do=_data)

    run = commands.add_parser("run")
    _add_choice(run)
    run.add_argument("--workers", type=int, default=1, help="cards to use, a process for each")
    run.add_argument("--seconds", type=float, default=560, help="time for all of it, from the start of this program")
    run.add_argument("--out", type=Path, help="folder for study.zip and the logs")
    run.add_argument("--untuned", action="store_true", help="train at the middle rate of rows that were not tuned")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="instead of what the recipe says")
    run.set_defaults(do=_run)

    work = commands.add_parser("work")  # one worker of `run` or `data`; no command for people
    work.add_argument("--job-list", type=Path, help="JSON lines; without it, encoding")
    work.add_argument("--claims", type=Path, required=True)
    work.add_argument("--deadline", type=float, required=True)
    work.add_argument("--number", type=int, required=True)
    work.add_argument("--untuned", action="store_true")
    work.add_argument("--compile", action=argparse.BooleanOptionalAction)
    work.set_defaults(do=_work)

    keep = commands.add_parser("keep")
    keep.add_argument("--out", type=Path, required=True)
    keep.add_argument("--row", action="append", default=[], help="default: full, and the best LoRA")
    keep.set_defaults(do=_keep)

    report = commands.add_parser("report")
    report.add_argument("--merge", type=Path, nargs="*", default=[], help="archives or folders of results to take in")
    report.add_argument("--out", type=Path, required=True, help="folder for study.md, study.json and curves")
    report.add_argument("--docs", type=Path, help="also put the tables between the marks in this Markdown file")
    report.set_defaults(do=_report)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def numbers(text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split(",")))

    def wholes(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser.add_argument("--kinds", type=words, default=(), help=f"of {','.join(KINDS)}; default all")
    parser.add_argument("--rows", type=words, default=(), help="default all")
    parser.add_argument("--fractions", type=numbers, default=(), help="0.1,0.3; default each row's own")
    parser.add_argument("--seeds", type=wholes, default=(), help="0,1,2; default each row's own")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="archives or folders of results to take in")


def _chosen(args: argparse.Namespace, study: Study) -> tuple[list[Job], Results]:
    results = Results(study.results)
    if args.merge:
        say(f"{results.merge(args.merge)} results taken in")
    return listed(study, Choice(args.kinds, args.rows, args.fractions, args.seeds)), results


def _list(args: argparse.Namespace, study: Study, started: float) -> int:
    jobs, results = _chosen(args, study)
    for job in jobs:
        say(f"{'done' if results.has(job) else '    '} {job.name}")
    left = [job for job in jobs if not results.has(job)]
    say(f"{len(jobs)} jobs, {len(left)} left: {training_seconds(study, left):.0f} GPU seconds of steps")
    return 0


def _data(args: argparse.Namespace, study: Study, started: float) -> int:
    from .data import join, part_folder, parts, prepare
    from .pool import run_all

    deadline = started + args.seconds
    prepare(study)
    for name in study.data:
        if (study.root / "data" / name).exists():
            say(f"{study.root / 'data' / name} is there and is taken as it is")
    statuses: list[int] = []
    if parts(study):
        part_folder(study, "", 0).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as claims:
            commands = [_worker(args, Path(claims), deadline - _LAST, i) for i in range(args.workers)]
            statuses = run_all(commands, study.folder / "logs", deadline, study.folder / "compiled")
    lacking = join(study)
    if lacking:
        say(f"not whole yet: {', '.join(lacking)}. Run the same command again.")
    if any(statuses):
        say(f"a worker failed; its log is in {study.folder / 'logs'}")
    say(f"{time.time() - started:.0f} s")
    return 1 if lacking else 0


def _worker(args: argparse.Namespace, claims: Path, deadline: float, number: int) -> list[str]:
    command = ["-m", "tools.small_model.study", "--study", str(args.study), "work", "--claims", str(claims)]
    return [*command, "--deadline", str(deadline), "--number", str(number)]


def _run(args: argparse.Namespace, study: Study, started: float) -> int:
    from .pool import run_all

    deadline = started + args.seconds - _LAST
    jobs, results = _chosen(args, study)
    _check(study, jobs, results, args.untuned)
    todo = sum(not results.has(job) for job in jobs)
    archive = args.out / "study.zip" if args.out else None
    packed = -1

    def pack() -> None:
        # After every job, so that a machine that goes away takes little with it.
        nonlocal packed
        if archive and (count := len(results.names())) != packed:
            packed = results.pack(archive) if count else 0

    with tempfile.TemporaryDirectory() as temp:
        claims, listing = Path(temp, "claims"), Path(temp, "jobs")
        claims.mkdir()
        listing.write_text("".join(job.to_json() + "\n" for job in jobs), encoding="utf-8")
        extra = ["--job-list", str(listing), *(["--untuned"] if args.untuned else [])]
        if args.compile is not None:
            extra.append("--compile" if args.compile else "--no-compile")
        commands = [_worker(args, claims, deadline, i) + extra for i in range(min(args.workers, todo))]
        statuses = run_all(commands, study.folder / "logs", deadline, study.folder / "compiled", pack)
    if args.out:
        for log in sorted((study.folder / "logs").glob("worker-*.log")):
            # Whole logs of many jobs are long; the end is what tells of a failure.
            (args.out / log.name).write_text(log.read_text(errors="replace")[-200_000:], encoding="utf-8")
    left = [job for job in jobs if not results.has(job)]
    say(f"{len(jobs) - len(left)} of {len(jobs)} jobs done, {time.time() - started:.0f} s; left: {_some(left)}")
    if any(statuses):
        say(f"a worker ended with an error; the logs are in {study.folder / 'logs'}")
        return 1
    return 0


def _some(jobs: list[Job]) -> str:
    names = ", ".join(job.name for job in jobs[:3])
    return f"{names} and {len(jobs) - 3} more" if len(jobs) > 3 else names or "none"


def _check(study: Study, jobs: list[Job], results: Results, untuned: bool) -> None:
    """Raise `T3Error` for runs that could never start; tell of results that were made by other settings."""
    for job in jobs:
        row = study.row(job.row)
        if job.kind == RUN and not untuned and results.rate(study, row) is None:
            tries = {Job(TUNE, row.name, row.plan, study.tune_fraction, rate=rate) for rate in row.rates}
            lacking = [other for other in tries if not results.has(other) and other not in jobs]
            if lacking:
                raise T3Error(
                    f"row {row.name!r} has no tuned rate: {lacking[0].name} is neither done nor asked for. "
                    "Add tune to --kinds, bring its results with --merge, or train at the middle rate with --untuned."
                )
            if all(results.has(other) for other in tries):
                raise T3Error(
                    f"row {row.name!r}: training went astray at every rate. Give it lower ones in study.toml."
                )
        if job.kind == ADHERENCE or (found := results.get(job)) is None:
            continue
        measured = study.tuning if job.kind == TUNE else study.validation
        if found["made"] != study.fingerprint(row, job.fraction, measured):
            say(f"{job.name} is there, made by other settings; remove it from {study.results} to have it run again")


def _work(args: argparse.Namespace, study: Study, started: float) -> int:
    from .worker import Claims, device_of, start

    if args.job_list is None:
        from .data import encode_parts

        encode_parts(study, Claims(args.claims), args.deadline, device_of(study))
        return 0
    jobs = [Job.from_json(line) for line in args.job_list.read_text(encoding="utf-8").splitlines()]
    start(study, jobs, args.claims, args.deadline, args.untuned, args.number)
    return 0


def _keep(args: argparse.Namespace, study: Study, started: float) -> int:
    from .training import kept

    results = Results(study.results)
    runs = [(found["mean"], job) for job, found in results.all() if job.kind == RUN and not found["astray"]]
    here = [(error, job) for error, job in runs if all(path.exists() for path in kept(study, job))]
    groups = [{name} for name in args.row] or [{"full"}, {name for name in study.rows if _plain_lora(study, name)}]
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for names in groups:
        some = [entry for entry in here if entry[1].row in names]
        if not some:
            say(f"no weights of {', '.join(sorted(names))} are on this machine")
            status = 1
            continue
        error, job = min(some, key=lambda entry: entry[0])
        shutil.copy(kept(study, job)[-1], args.out)
        say(f"{args.out / kept(study, job)[-1].name}: error {error:.6g}")
    return status


def _plain_lora(study: Study, name: str) -> bool:
    """A LoRA on the dense model itself, by the study's plan: what one file says."""
    row = study.rows[name]
    tables = row.phases[-1].tables
    dense = tables.get("model", {}).get("dense_layers")
    return (
        len(row.phases) == 1
        and tables.get("trainable", {}).get("what") == "lora"
        and row.plan == study.plan
        and not dense
    )


def _report(args: argparse.Namespace, study: Study, started: float) -> int:
    from .report import write

    results = Results(study.results)
    say(f"{results.merge(args.merge)} results taken in")
    text = write(study, results, args.out)
    if args.docs:
        from .report import put

        put(args.docs, text)
    say(json.dumps({"out": str(args.out), "results": len(results.names())}))
    return 0
