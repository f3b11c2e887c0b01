"""Say which backends this machine can use and which one `auto` takes, and time them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import T3Error
from ..plan import PRESETS
from . import table, tuning
from .choice import AUTO, AUTO_INT8, auto_order, choose, explain
from .registry import BACKENDS, Situation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def preset_windows() -> list[int]:
    """The lengths of windows of all presets on their own grids, longest first."""
    windows = {
        length
        for plan in PRESETS.values()
        for layer in range(len(plan.layers))
        for length in plan.partition(layer, plan.grid).window_lengths(plan.grid)
        if plan.partition(layer, plan.grid).windows > 1
    }
    return sorted(windows, reverse=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m t3.backends", description=__doc__)
    made.add_argument("--window", type=int, nargs="+", metavar="N", default=[], help="lengths of windows, in tokens")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    made.add_argument("--head-dim", type=int, default=128, metavar="N", help="channels of a head (default: 128)")
    made.add_argument(
        "--measure",
        action="store_true",
        help="time every usable backend for these windows (default: those of the released plans) and keep the times",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="also add what --measure finds to this table")
    return made


def measure(situation: Situation, windows: list[int], out: Path | None) -> None:
    """Time all usable backends, those that compile for long included, and save each window's times at once."""
    if situation.capability is None:
        raise T3Error(f"--measure needs an NVIDIA card, and this is {situation.device}. Leave it out.")
    # Those that build the score matrix need more memory than a card has; sdpa hands on to one of the others.
    names = [b.name for b in BACKENDS.values() if not b.scores and b.name != "sdpa"]
    names.sort(key=lambda name: name not in auto_order(situation.capability))
    for window in windows:
        here = replace(situation, windows=(window,))
        usable = [name for name in names if BACKENDS[name].refusal(here) is None]
        entry = tuning.tune(here, window, usable, seconds=60.0, patient=True)
        assert entry is not None
        table.save([entry], table.cache_file())
        if out is not None:
            table.save([entry], out)
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(entry.ms.items(), key=lambda item: item[1]))
        failed = "".join(f"; {name} failed: {why}" for name, why in entry.failed.items())
        print(f"{entry.windows} x {window:,} tokens, {entry.heads} heads: {times}{failed}", flush=True)
    print(f"kept in {table.cache_file()}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = parser().parse_args(arguments)
    if wrong := [n for n in (*options.window, options.head_dim) if n < 1]:
        print(f"error: {wrong[0]} is no number of tokens or channels; give at least 1.", file=sys.stderr)
        return 2
    if options.out and not options.measure:
        print(f"error: --out {options.out} is for what --measure finds; give both, or neither.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    situation = Situation(device, DTYPES[options.dtype], options.head_dim)
    try:
        if options.measure:
            measure(situation, options.window or preset_windows(), options.out)
            return 0
        for name, verdict in explain(situation).items():
            print(f"{name:20} {verdict:60} {BACKENDS[name].about}")
        for window in options.window or [None]:
            here = replace(situation, windows=(window,) if window else ())
            at = f" for windows of {window:,} tokens" if window else ""
            print(f"\n{AUTO}{at} takes {choose(AUTO, here)[1]}")
            print(f"{AUTO_INT8}{at} takes {choose(AUTO_INT8, here)[1]}")
    except T3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
