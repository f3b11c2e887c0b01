"""`python -m t3.retrofit`: train by a config, encode clips, list recipes."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..claims import Claim, take_folder
from ..cli import BAD_INPUT, let_segments_grow, quiet_libraries, run, say
from ..errors import T3Error
from ..files import check_output
from ..parallel.faults import leave
from .config import Config, read_config

CONFIG = "config.toml"  # the copy in the output folder
USAGE = """python -m t3.retrofit CONFIG.toml [--dry-run] [--resume]
       python -m t3.retrofit encode ...     clips to latents and text embeddings
       python -m t3.retrofit recipes ...    configs to start from"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit status: 0, 1 (not everything is on disk), 2 (bad input), 130 (stopped)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    let_segments_grow()
    if arguments[:1] == ["encode"]:
        from .encode_command import main as encode

        return encode(arguments[1:])
    if arguments[:1] == ["recipes"]:
        from .recipes_command import main as recipes

        return recipes(arguments[1:])
    args = _parser().parse_args(arguments)
    started = time.monotonic()
    return run("t3.retrofit", lambda: train(args, started), as_json=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="t3.retrofit", usage=USAGE, description=__doc__)
    parser.add_argument("config", metavar="CONFIG.toml", help="what to train and how; docs/retrofit.md")
    parser.add_argument("--dry-run", action="store_true", help="check everything and estimate memory and time")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the output folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="change the config, the value in TOML; repeatable: train.seed=1, stages.2.lr=3e-4",
    )
    return parser


def train(args: argparse.Namespace, started: float) -> int:
    """Everything a config asks for. Raises `T3Error` for what cannot be done, before any step where it can be known."""
    config = read_config(args.config, args.set)
    folder = Path(config.output.folder).absolute()
    if config.note:
        say(f"note: {config.note}")
    resumed = _check_folder(folder, args.resume, args.dry_run)
    quiet_libraries()
    from . import model
    from .data import open_clips

    found = model.find(config.model)
    config = model.at_its_noise(config, found)
    if config.samples.prompts:
        from .samples import check_asked

        check_asked(found, config.samples)
    clips = open_clips(config.data, found.config, config.model.text_tokens)
    if args.dry_run:
        from .estimate import describe

        print("\n".join(describe(config, found, clips)))
        return 0
    from .session import make_accelerator, start

    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        say(f"{found.name}: plan {found.plan.name!r}, {found.reason}")
        say(f"{clips.count} clips to train on, {len(clips.held_out)} held out")
        for note in (*model.describe(found, clips), *clips.notes, *model.check_grids(found, clips)):
            say(note)
    check_output(folder / CONFIG, overwrite=True)
    with _claimed(folder) if accelerator.is_main_process else contextlib.nullcontext():
        session = start(config, found, clips, accelerator)
        from .loop import Loop

        loop = Loop(session, folder, started)
        if resumed is not None:
            loop.restore(resumed)
            session.say(f"going on from {resumed}")
        if session.main:
            text = Path(args.config).read_text(encoding="utf-8-sig")
            text += "".join(f"# --set {change}\n" for change in args.set)
            (folder / CONFIG).write_text(text, encoding="utf-8")
        status = loop.run()
    if accelerator.num_processes > 1:
        accelerator.end_training()
        # All is on disk. Threads of the processes' group that outlive it abort an interpreter that ends, now and then.
        leave(status)
    return status


def _claimed(folder: Path) -> Claim:
    """The output folder for this run alone, until its `with` block ends. Raises `T3Error` where another has it."""
    return take_folder(
        folder / CONFIG,
        "is in use by",
        "and two runs would mix up their files. Wait until it ends, or name another [output] folder.",
    )


def _check_folder(folder: Path, resume: bool, dry_run: bool) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start. Raises `T3Error` where a run would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise T3Error(f"[output] folder: {folder} is a file. Name another folder.")
    if dry_run:
        return None
    found = sorted((folder / "checkpoints").glob("step-????????"))
    if resume:
        if not found:
            say(f"{folder} has no checkpoint; starting from the beginning.")
        return found[-1] if found else None
    if found or list(folder.glob("*.safetensors")):
        raise T3Error(f"{folder} holds a run already. Go on with --resume, or name another [output] folder.")
    return None


__all__ = ["BAD_INPUT", "Config", "main", "train"]
