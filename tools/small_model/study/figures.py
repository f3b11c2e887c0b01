"""Curves of the study: closure and excess by budget, and by noise band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import say
from .evidence import CONTROL, Evidence
from .statistics import BANDS, Estimate


def draw(e: Evidence, out: Path) -> list[Path]:
    """Write study-budget.png and study-bands.png as far as there is something to draw; the files that were written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no curves: matplotlib is not installed. The numbers are in study.json.")
        return []
    rows = [name for name in e.study.rows if name != CONTROL and any(e.curve(name, f) for f in e.study.fractions)]
    if not rows:
        say("no curves: no row has been run beside the control.")
        return []
    paths = []
    for name, make in (("study-budget.png", _by_budget), ("study-bands.png", _by_band)):
        figure = Figure(figsize=(11, 5))
        make(e, rows, figure)
        figure.tight_layout()
        figure.savefig(out / name, dpi=110)
        paths.append(out / name)
    return paths


def _by_budget(e: Evidence, rows: list[str], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    ticks = [100 * fraction for fraction in e.study.fractions]
    for row in rows:
        budgets = [f for f in e.study.fractions if e.curve(row, f)]
        if len(budgets) < 2:
            continue  # the other figure has it
        curves = [curve for f in budgets if (curve := e.curve(row, f))]
        percents = [100 * f for f in budgets]
        for axes, found, scale in (
            (left, [curve.closure() for curve in curves], 100),
            (right, [curve.excess() for curve in curves], 1000),
        ):
            places = [place for place, each in zip(percents, found, strict=True) if each is not None]
            values, spread = _scaled(found, scale)
            axes.errorbar(places, values, spread, marker="o", ms=3, lw=1, label=row)
    left.set(title="closure, %", xlabel="% of pre-training's GPU seconds", xscale="log")
    right.set(title="excess over the control, thousandths", xlabel="% of pre-training's GPU seconds", xscale="log")
    right.axhline(0, color="black", lw=0.5)
    for axes in (left, right):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if axes.containers:
            axes.legend(fontsize=7)


def _by_band(e: Evidence, rows: list[str], figure: Any) -> None:
    axes = figure.subplots()
    bands = [band for band in BANDS if band != "whole"]
    fraction = e.study.first[0]
    shown = [(row, curve) for row in rows if (curve := e.curve(row, fraction))]
    for i, band in enumerate(bands):
        found = [curve.closure(band) for _, curve in shown]
        places = [number + 0.27 * (i - 1) for number, each in enumerate(found) if each is not None]
        values, spread = _scaled(found, 100)
        axes.bar(places, values, 0.27, yerr=spread, label=f"{band} noise", error_kw={"lw": 0.8})
    axes.set_xticks(range(len(shown)), [row for row, _ in shown], rotation=60, ha="right", fontsize=7)
    axes.set(title=f"closure by noise band at {100 * fraction:g} %, %")
    axes.legend(fontsize=7)


def _scaled(found: Sequence[Estimate | None], scale: float) -> tuple[list[float], list[list[float]]]:
    """Values times `scale`, and how far their intervals reach below and above; those that are none left out."""
    there = [each for each in found if each is not None]
    # Not less than 0: where nothing varies, rounding puts an end on the wrong side, which matplotlib refuses.
    spread = [
        [max(0.0, scale * (e.value - e.low)) for e in there],
        [max(0.0, scale * (e.high - e.value)) for e in there],
    ]
    return [scale * each.value for each in there], spread
