"""Results drawn as PNG. Needs matplotlib; works from a file of results, so that it can be done on another machine."""

from __future__ import annotations

import glob
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import T3Error
from ..files import atomic_path, check_output
from . import growth, machine, paying
from .tables import number

HOW = (
    "pip install matplotlib (or the `bench` extra), or draw later from --out: python -m t3.bench plot FILE --plots DIR"
)
# Of two values of one unit, one axis each.
UNITS = {"ms": "milliseconds", "seconds": "seconds"}


def check_plots(folder: Path, prefix: str, overwrite: bool) -> None:
    """Raise `T3Error` if plots cannot be drawn here, or ones of this prefix are in `folder` already."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise T3Error(f"--plots needs matplotlib, which is not installed: {HOW}") from None
    check_output(folder / f"{prefix}-plots.png", overwrite)
    there = sorted(folder.glob(f"{glob.escape(prefix)}-*.png"))
    if there and not overwrite:
        raise T3Error(f"{there[0]} exists already. Name another folder as --plots, or allow --overwrite.")


def draw(data: Mapping[str, Any], folder: Path, prefix: str) -> list[Path]:
    """A picture for each case of each table that has times; returns the files. Replaces what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    cases = dict.fromkeys((row["table"], row["case"]) for row in data["rows"])
    shorts = [case for case in cases if case[0] == paying.SHORT]
    for table, case in cases:
        rows = [row for row in data["rows"] if (row["table"], row["case"]) == (table, case)]
        if table == growth.TABLE:
            figure = _growth(rows)
        elif table == paying.SHORT:
            continue
        else:
            figure = _bars(rows)
        if figure is not None:
            files.append(_save(figure, data, f"{table}: {case}", folder / f"{prefix}-{_slug(table, case)}.png"))
    if shorts:
        figure = _short([row for row in data["rows"] if row["table"] == paying.SHORT])
        if figure is not None:
            files.append(_save(figure, data, paying.SHORT, folder / f"{prefix}-{_slug(paying.SHORT)}.png"))
    return files


def _slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")[:80]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, data: Mapping[str, Any], title: str, path: Path) -> Path:
    characters = int(figure.get_figwidth() * 14)
    line = textwrap.fill(machine.machine_line(data["machine"], data["ceilings"]), characters)
    tiny = f"\n{data['tiny']}" if data.get("tiny") else ""
    figure.suptitle(f"{title}\n{line}{tiny}", fontsize=8)
    with atomic_path(path, overwrite=True) as part:
        figure.savefig(part, dpi=120)
    return path.absolute()


def _bars(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Bars of milliseconds or seconds, one a row, the floor as a line."""
    unit = next((unit for unit in UNITS if any(unit in row for row in rows)), None)
    if unit is None:
        return None
    shown = [row for row in rows if row.get(unit) is not None and row["variant"] != "floor"]
    if not shown:
        return None
    figure, (axis,) = _figure(9, 1.4 + 0.28 * len(shown))
    names = [row["variant"] for row in shown]
    bars = axis.barh(names, [row[unit] for row in shown], color=["0.7" if row.get("peer") else "C0" for row in shown])
    axis.bar_label(bars, [number(row[unit]) for row in shown], padding=3, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    values = [row[unit] for row in rows if row.get(unit)]
    if max(values) > 20 * min(values):
        axis.set_xscale("log")
    axis.set_xlabel(f"{UNITS[unit]} (less is better; grey: peers)")
    for row in rows:
        if row["variant"] == "floor" and row.get(unit):
            axis.axvline(row[unit], color="C3", linewidth=1, label="floor")
            axis.legend(fontsize=7)
    axis.tick_params(labelsize=7)
    return figure


def _growth(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Attention, forward pass and peak against tokens; what was computed is dashed."""
    every = (
        ("attention_ms", "attention of a layer, ms"),
        ("forward_s", "forward pass, s"),
        ("activations_gib", "peak beside the weights, GiB"),
    )
    from matplotlib.ticker import NullFormatter

    panels = [panel for panel in every if any(row.get(panel[0]) for row in rows)]
    if not panels:
        return None
    figure, axes = _figure(4.2 * len(panels), 4.2, len(panels))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for mode, colour in (("dense", "0.4"), ("T3", "C0")):
            points = [row for row in rows if row.get("mode") == mode and row.get(key)]
            points.sort(key=lambda row: row["tokens"])
            known = [row for row in points if not row.get("computed")]
            rest = known[-1:] + [row for row in points if row.get("computed")]
            for some, style, label in ((known, "o-", mode), (rest, "o--", f"{mode}, computed")):
                if len(some) > (style == "o--"):
                    xs, ys = [row["tokens"] for row in some], [row[key] for row in some]
                    filled = colour if style == "o-" else "none"
                    axis.plot(xs, ys, style, color=colour, label=label, markersize=4, markerfacecolor=filled)
            for row in points:
                axis.annotate(
                    row["size"], (row["tokens"], row[key]), fontsize=6, xytext=(3, -8), textcoords="offset points"
                )
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        for side in (axis.xaxis, axis.yaxis):  # over less than a decade they would write over each other
            side.set_minor_formatter(NullFormatter())
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _short(rows: Sequence[Mapping[str, Any]]) -> Any:
    """How many times as long dense attention takes, against the frames of the clip; below one T3 does not pay."""
    rows = [row for row in rows if row.get("dense_over_t3")]
    if not rows:
        return None
    figure, (axis,) = _figure(6, 4)
    for colour, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        for key, style, what in (("dense_over_t3", "o-", "attention"), ("forward_over_t3", "s--", "forward pass")):
            some = [row for row in rows if row["case"] == case and row.get(key)]
            if some:
                xs, ys = [row["frames"] for row in some], [row[key] for row in some]
                axis.plot(xs, ys, style, color=f"C{colour}", label=f"{case}, {what}", markersize=4)
    axis.axhline(1, color="0.5", linewidth=1)
    axis.set(xlabel="frames", ylabel="dense over T3, of time (below 1: T3 loses)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
