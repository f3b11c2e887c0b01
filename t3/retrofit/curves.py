"""The run's numbers: CSV always, TensorBoard and a PNG of the curves where their packages are installed."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

METRICS = ("step", "stage", "seconds", "training", "clips", "lr", "loss", "flow", "velocity", "attention", "grad_norm")
VALIDATION = ("step", "stage", "seconds", "training", "clips", "whole", "low", "middle", "high")


class Table:
    """A CSV file that grows by a line at a time. On a resumed run lines after `step` are of work that is redone."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int) -> None:
        self.path, self.columns = path, columns
        kept = [row for row in read(path) if int(row["step"]) <= step]
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line; numbers that are none are left empty."""
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self.columns).writerow({name: _cell(row.get(name)) for name in self.columns})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class Curves:
    """What a run writes of its numbers: `metrics.csv`, `validation.csv`, `tensorboard/` and `curves.png`."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.tables = {
            "metrics": Table(folder / "metrics.csv", METRICS, step),
            "validation": Table(folder / "validation.csv", VALIDATION, step),
        }
        self.board = _board(folder, step, say) if tensorboard else None

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """A line of "metrics" or "validation"; `row` has the table's columns."""
        self.tables[table].add(row)
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float) and not math.isnan(value) and name not in ("seconds", "training"):
                    self.board.add_scalar(f"{table}/{name}", value, row["step"])

    def draw(self) -> None:
        """Draw both tables into `curves.png`."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.say("curves.png is not drawn: matplotlib is not installed. The numbers are in metrics.csv.")
            return
        figure = Figure(figsize=(9, 9))
        upper, lower = figure.subplots(2, 1)
        figure.subplots_adjust(hspace=0.35)
        _lines(upper, read(self.tables["metrics"].path), ("loss", "flow", "velocity", "attention"), "training loss")
        bands = ("whole", "low", "middle", "high")
        _lines(lower, read(self.tables["validation"].path), bands, "held-out velocity error by noise")
        figure.savefig(self.folder / "curves.png", dpi=120)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _board(folder: Path, step: int, say: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("no TensorBoard: the package tensorboard is not installed. The numbers are in metrics.csv.")
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)


def _lines(axes: Any, rows: list[dict[str, str]], names: tuple[str, ...], title: str) -> None:
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", linewidth=1, label=name)
    axes.set(title=title, xlabel="step", yscale="log")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
