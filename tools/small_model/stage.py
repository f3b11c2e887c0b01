"""One stage of the model from what is there to its measured result, in one command that ends in time.

    python -m tools.small_model.stage image --seconds 570 --keep KEPT
    python -m tools.small_model.stage low --seconds 570 --keep KEPT --start KEPT/dense-short.safetensors

It puts the pipeline folder together if need be, encodes the sets that are missing, trains by the stage's recipe for the
seconds that are left, samples and judges clips, and copies to KEPT what is worth keeping: the weights, the tables of
the run, its log, the judgement and a picture. What the stages are is in `stages.toml`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t3.retrofit.config import read_config
from t3.retrofit.shards import INDEX, join

from . import encode, evaluate
from .files import Stopwatch, read_toml, say, visible_cards
from .init_dit import prepare_folder

STAGES = Path(__file__).with_name("stages.toml")
ROOT = Path(__file__).resolve().parents[2]
LEAST = 60.0  # seconds of training, its start included, below which a stage is not begun


@dataclass(frozen=True)
class Stage:
    """An entry of `stages.toml`. recipe: where it lies; sets: arguments of `encode` by name."""

    recipe: Path
    sets: dict[str, dict[str, Any]]
    reserve: float
    evaluate: dict[str, Any]


def read_stage(path: Path, name: str) -> Stage:
    """The stage called `name`. Ends the program where there is none."""
    found = read_toml(path)
    if name not in found["stages"]:
        raise SystemExit(f"{path} has no stage {name!r}. There are {', '.join(found['stages'])}.")
    entry = found["stages"][name]
    sets = {each: found["sets"][each] for each in entry["sets"]}
    return Stage(path.parent / entry["recipe"], sets, entry["reserve"], entry["evaluate"])


def arguments_of(values: Mapping[str, Any]) -> list[str]:
    """A command line's arguments."""
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def encode_sets(stage: Stage, root: Path, device: str, fresh: int, cards: int) -> None:
    """Encode what is missing. fresh: added to the scene numbers of training sets, which `cards` processes share."""
    for name, asked in stage.sets.items():
        folder = root / "data" / name
        if (folder / INDEX).exists():
            continue
        test, start = asked.get("split") == "test", asked.get("start", 0)
        common = {**asked, "start": start if test else start + fresh, "model": root / "model", "device": device}
        if test or cards == 1:
            encode.main(arguments_of({**common, "out": folder}))
            continue
        parts = [folder.with_name(f"{name}.part-{card}") for card in range(cards)]
        edges = [asked["clips"] * card // cards for card in range(cards + 1)]
        pairs = itertools.pairwise(edges)
        shares = [{"start": common["start"] + first, "clips": last - first} for first, last in pairs]
        encode_parts(
            [arguments_of({**common, **share, "out": part}) for share, part in zip(shares, parts, strict=True)]
        )
        join(folder, parts)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the training's process


def encode_parts(parts: list[list[str]]) -> None:
    """Run `encode` with each of these arguments, a process and a card each. Ends the program where one fails."""
    command = [sys.executable, "-m", "tools.small_model.encode"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    running = []
    try:
        for card, arguments in zip(visible_cards(len(parts)), parts, strict=True):
            environ = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "PYTHONPATH": paths}
            running.append(subprocess.Popen([*command, *arguments], env=environ))
        for process in running:
            if process.wait():
                raise SystemExit(f"an encode of {len(running)} ended with {process.returncode}; see above.")
    finally:
        for process in running:
            process.kill()
            process.wait()


def train(stage: Stage, changes: list[str], log: Path, cards: int) -> None:
    """Run the recipe in processes of its own, whose output goes to a file. Ends the program where it fails."""
    launch = [] if cards == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)]
    command = [sys.executable, "-u", *launch, "-m", "t3.retrofit", str(stage.recipe)]
    with log.open("w", encoding="utf-8") as stream:
        # A file, not a pipe: processes that compile may outlive the program and would keep a pipe open.
        done = subprocess.run(
            [*command, *(text for change in changes for text in ("--set", change))],
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    say("\n".join(lines[-6:]))
    if done.returncode:
        raise SystemExit(f"t3.retrofit ended with {done.returncode}; its output is in {log}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.stage", description=__doc__.split("\n")[0])
    parser.add_argument("stage", help="image, short, low, t3-low or high; see stages.toml")
    parser.add_argument("--seconds", type=float, default=0, help="for all of it; 0: as the recipe says")
    parser.add_argument("--keep", type=Path, required=True, help="folder for what is worth keeping")
    parser.add_argument("--start", type=Path, help="weights to go on from, in place of the recipe's")
    parser.add_argument("--name", help="of the run and its weights, in place of the recipe's")
    parser.add_argument("--fresh", type=int, default=0, help="added to the numbers of training scenes")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="as t3.retrofit takes it")
    parser.add_argument("--root", type=Path, default=Path("output/small"), help="folder that the recipes name")
    parser.add_argument("--stages", type=Path, default=STAGES)
    parser.add_argument("--cards", type=int, default=1, help="that share the encode and the training (a batch each)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    watch = Stopwatch(args.seconds or float("inf"))
    stage = read_stage(args.stages, args.stage)
    changes = list(args.set)
    if args.start:
        changes.append(f'model.dit=["{args.start.absolute()}"]')
    if args.name:
        changes.append(f'output.folder="{args.root / args.name}"')
    read_config(stage.recipe, changes)  # what is wrong in it is told before anything is encoded
    args.keep.mkdir(parents=True, exist_ok=True)
    prepare_folder(args.root)
    encode_sets(stage, args.root, args.device, args.fresh, args.cards)
    say(f"{watch.used():.0f} s: data is there")
    if args.seconds:
        left = watch.limit - watch.used() - stage.reserve
        if left < LEAST:
            raise SystemExit(f"{left:.0f} s are left for training, {LEAST:.0f} are the least. Give more --seconds.")
        changes.append(f"stages.1.max_seconds={left:.0f}")
    folder = Path(read_config(stage.recipe, changes).output.folder)
    train(stage, changes, args.keep / f"{folder.name}.txt", args.cards)
    weights = folder / f"{folder.name}.safetensors"
    shutil.copy(weights, args.keep)
    for table in ("metrics.csv", "validation.csv"):
        shutil.copy(folder / table, args.keep / f"{folder.name}-{table}")
    say(f"{watch.used():.0f} s: trained, {weights.name}")
    results = {"out": args.keep / f"{folder.name}.json", "pictures": args.keep / f"{folder.name}.png"}
    asked = {"model": args.root / "model", "dit": weights, "device": args.device}
    evaluate.main(arguments_of({**asked, **stage.evaluate, **results}))
    say(f"{watch.used():.0f} s: measured")


if __name__ == "__main__":
    main()
