"""The plans that are piloted on the high size's grid of 6 x 28 x 40 tokens, from mild to severe.

    python -m tools.small_model.plans --out output/small/plans

"clip" has windows of the paper's part of the whole clip, "frame" of its part of a frame, "gentle" is four times milder
than that. The study takes the mildest that breaks the un-tuned model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from t3.plan import EACH, Grid, Layer, Plan

from .files import fresh_folder, say

GRID = Grid(6, 28, 40)
PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "small-gentle", GRID, (Layer(EACH, 1, 1), Layer(1, 4, 5), Layer(1, 2, 10), Layer(3, 4, 2), Layer(2, 4, 4))
        ),
        Plan(
            "small-frame", GRID, (Layer(EACH, 1, 1), Layer(1, 7, 10), Layer(1, 4, 20), Layer(3, 7, 4), Layer(2, 7, 8))
        ),
        Plan(
            "small-clip",
            GRID,
            (Layer(EACH, 1, 1), Layer(1, 14, 20), Layer(1, 7, 20), Layer(3, 14, 10), Layer(2, 14, 10)),
        ),
    )
}


def write(folder: Path) -> None:
    """Write every plan into `folder`, and say how long its windows are."""
    for name, plan in PLANS.items():
        (folder / f"{name}.json").write_text(plan.to_json() + "\n")
        sizes = [max(size for _, size in partition.window_classes(GRID)) for partition in plan.partitions(GRID, 5)]
        say(f"{name}: windows of {sizes} tokens")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.plans", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    write(fresh_folder(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()
