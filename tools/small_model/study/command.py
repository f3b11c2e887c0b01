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
from t3.files import atomic_path

from ..files import say
from .jobs import KINDS, RUN, Choice, Job, kept, listed, sampled_weights, training_seconds, tries_of
from .results import Results
from .settings import FILE, Study, read_study

_MERGE = "what former runs brought to their --out: those folders, or study.zip and weights out of them"
_LAST = 15.0  # seconds of `run --seconds` that are kept for ending workers and writing the archive
_START = 20.0  # that a process is expected to take before its first job


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
    lists.add_argument("--workers", type=int, default=1, help="cards to say of what fits into --seconds")
    lists.add_argument("--seconds", type=float, help="also say which jobs `run` would do in so many")
    lists.add_argument("--untuned", action="store_true", help="as for run")
    lists.set_defaults(do=_list)

    data = commands.add_parser("data")
    data.add_argument("--workers", type=int, default=1, help="cards to use")
    data.add_argument("--seconds", type=float, default=540)
    data.set_defaults(do=_data)

    run = commands.add_parser("run")
    _add_choice(run)
    run.add_argument("--workers", type=int, default=1, help="cards to use, a process for each")
    run.add_argument("--seconds", type=float, default=560, help="time for all of it, from the start of this program")
    run.add_argument("--out", type=Path, help="folder for study.zip, the weights that are sampled, and the logs")
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
    report.add_argument("--merge", type=Path, nargs="*", default=[], help=_MERGE)
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
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help=_MERGE)


def _results(args: argparse.Namespace, study: Study) -> Results:
    """The results there are, with those that are to be taken in, and without those of other settings."""
    results, sources = Results(study.results), getattr(args, "merge", [])
    for folder in (source for source in sources if source.is_dir()):
        sources = [*sources, *sorted(folder.glob("*.zip")), *sorted(folder.glob("*.safetensors"))]
    weights = [path for path in sources if path.suffix == ".safetensors"]
    if sources:
        say(f"{results.merge(path for path in sources if path not in weights)} results taken in")
    for path in weights:
        if not (study.weights / path.name).exists():
            _copy(path, study.weights)
    if aside := results.set_aside(study):
        say(f"{len(aside)} results of other settings, now in {study.results / 'former'}: {_some(aside)}")
    return results


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / path.name, overwrite=True) as temp:
        shutil.copyfile(path, temp)


def _chosen(args: argparse.Namespace, study: Study) -> tuple[list[Job], Results]:
    results = _results(args, study)
    return listed(study, Choice(args.kinds, args.rows, args.fractions, args.seeds)), results


def _list(args: argparse.Namespace, study: Study, started: float) -> int:
    jobs, results = _chosen(args, study)
    for job in jobs:
        say(f"{'done' if results.has(job) else '    '} {job.name}")
    left = [job for job in jobs if not results.has(job)]
    say(f"{len(jobs)} jobs, {len(left)} left: {training_seconds(study, left):.0f} GPU seconds of steps")
    if args.seconds is not None:
        _foretell(study, jobs, results, args.workers, args.seconds, args.untuned)
    return 0


def _foretell(study: Study, jobs: list[Job], results: Results, workers: int, seconds: float, untuned: bool) -> None:
    """Say what fits into the time, and what lacks the weights it would sample."""
    from .worker import foreseen

    left = [job for job in jobs if not results.has(job)]
    fit = foreseen(study, jobs, results, workers, seconds - _LAST - _START, untuned)
    steps = training_seconds(study, fit)
    cards = f"{workers} card{'s' if workers > 1 else ''}"
    say(f"{len(fit)} of {len(left)} jobs fit into {seconds:.0f} s on {cards}, {steps:.0f} s of steps: {_some(fit)}")
    for name, paths in sampled_weights(study, left).items():
        lacking = [path for path in paths if not path.exists()]
        if lacking and (study.results / f"{name}.json").exists():
            say(
                f"{lacking[0]} is not here, so nothing is sampled from it. Bring it with --merge, or remove "
                f"{study.results / name}.json to have it trained again."
            )


def _data(args: argparse.Namespace, study: Study, started: float) -> int:
    from .data import join, part_folder, parts, prepare
    from .pool import run_all

    deadline = started + args.seconds - _LAST
    prepare(study)
    for name in study.data:
        if (study.shards / name).exists():
            say(f"{study.shards / name} is there and is taken as it is")
    statuses: list[int] = []
    if parts(study):
        part_folder(study, "", 0).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as claims:
            commands = [_worker(args, Path(claims), deadline, i) for i in range(args.workers)]
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
    _foretell(study, jobs, results, args.workers, args.seconds - (time.time() - started), args.untuned)
    weights = [path for paths in sampled_weights(study, listed(study)).values() for path in paths]
    packed, brought = -1, set()

    def pack() -> None:
        # After every job, so that a machine that goes away takes little with it.
        nonlocal packed
        if args.out and (count := len(results.names())) != packed:
            packed = results.pack(args.out / "study.zip") if count else 0
            for path in weights:
                if path.exists() and (version := (path, path.stat().st_mtime_ns)) not in brought:
                    _copy(path, args.out)
                    brought.add(version)

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


def _some(jobs: Sequence[Job | str]) -> str:
    names = [job if isinstance(job, str) else job.name for job in jobs[:3]]
    return ", ".join(names) + (f" and {len(jobs) - 3} more" if len(jobs) > 3 else "") or "none"


def _check(study: Study, jobs: list[Job], results: Results, untuned: bool) -> None:
    """Raise `T3Error` for runs that could never start."""
    for job in jobs:
        row = study.row(job.row)
        if job.kind == RUN and not untuned and results.rate(study, row) is None:
            tries = tries_of(study, row)
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


def _work(args: argparse.Namespace, study: Study, started: float) -> int:
    from .pool import end_with_parent
    from .worker import Claims, device_of, start

    end_with_parent()
    if args.job_list is None:
        from .data import encode_parts

        encode_parts(study, Claims(args.claims), args.deadline, device_of(study))
        return 0
    jobs = [Job.from_json(line) for line in args.job_list.read_text(encoding="utf-8").splitlines()]
    start(study, jobs, args.claims, args.deadline, args.untuned, args.number)
    return 0


def _keep(args: argparse.Namespace, study: Study, started: float) -> int:
    results = _results(args, study)
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

    results = _results(args, study)
    text = write(study, results, args.out)
    if args.docs:
        from .report import put

        put(args.docs, text)
    say(json.dumps({"out": str(args.out), "results": len(results.names())}))
    return 0
