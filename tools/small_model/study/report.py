"""The study as Markdown tables and curves, from whatever results there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t3.files import put_between

from ..plans import PLANS
from .evidence import CONTROL, DENSE_ROW, FULL, PLAIN, UNTUNED, Evidence
from .figures import draw
from .results import Results
from .settings import Study
from .statistics import BANDS, Curve
from .verdicts import NOT_RUN, Verdict, at, bars, claims, closed, gates, mildest, percent, points

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
NONE = "-"


def write(study: Study, results: Results, out: Path) -> str:
    """Write study.md, study.json (verdicts and closures) and the curves into `out`; returns the Markdown."""
    evidence = Evidence(study, results)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(evidence)
    numbers = {
        "gates": [asdict(v) for v in gates(evidence)],
        "bars": [asdict(v) for v in bars(evidence)],
        "claims": [asdict(v) for v in claims(evidence)],
        "closure": {
            f"{row}@{fraction:g}": {band: _numbers(curve, band) for band in BANDS}
            for row in study.rows
            for fraction in study.fractions
            if (curve := evidence.curve(row, fraction))
        },
    }
    (out / "study.md").write_text(text, encoding="utf-8")
    (out / "study.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(evidence, out)
    return text


def _numbers(curve: Curve, band: str) -> dict[str, Any]:
    """Closure (null where there is no gap), the absolute excess, and the gap: the un-tuned excess."""
    closure = curve.closure(band)
    return {
        "closure": None if closure is None else asdict(closure),
        "excess": asdict(curve.excess(band)),
        "gap": asdict(curve.gap(band)),
    }


def put(docs: Path, text: str) -> None:
    """Put the tables between the marks of a Markdown file. Raises `T3Error` where it has none."""
    put_between(docs, BEGIN, END, f"{text}\n", "the tables")


def markdown(e: Evidence) -> str:
    """All tables, with a heading each."""
    parts = [
        ("Gates", verdict_table(gates(e)) + f"\n{mildest(e)}\n"),
        ("Bars", verdict_table(bars(e))),
        ("Claims of the paper", verdict_table(claims(e))),
        ("Rows: closure and excess", rows_table(e)),
        ("By noise band", bands_table(e)),
        ("Severity", sweep_table(e)),
        ("Size that is tuned at, attention that is tuned", two_by_two(e)),
        ("Sampled clips", sampled_table(e)),
        ("T3 against dense at the high size", against_dense(e)),
        ("Learning rates", rates_table(e)),
        ("What was run", run_table(e)),
    ]
    return "\n".join(f"### {title}\n\n{text}" for title, text in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def verdict_table(found: list[Verdict]) -> str:
    return _table(
        ("what", "rule", "numbers", "verdict"), [(v.what, v.rule, v.numbers, f"**{v.verdict}**") for v in found]
    )


def _trained(e: Evidence, closures: bool = True) -> list[str]:
    """Rows that train, those of all budgets first; the control, which closures are measured against, left out."""
    rows = [row for row in e.study.rows.values() if not row.measure and not (closures and row.name == CONTROL)]
    return [row.name for row in sorted(rows, key=lambda row: not row.deciding)]


def rows_table(e: Evidence) -> str:
    """Closure in percent with its interval, and under it the absolute excess in thousandths, by row and budget."""
    lines = []
    for name in _trained(e):
        row, cells = e.study.row(name), []
        for fraction in e.study.fractions:
            curve = e.curve(name, fraction)
            if curve is None:
                cells.append(NONE)
                continue
            excess = curve.excess()
            seeds = "" if len(curve.row) == 1 else f", {len(curve.row)} seeds"
            cells.append(f"{percent(curve.closure())}<br>{1000 * excess.value:+.2f}{seeds}")
        astray = f" ({e.astray(name)} astray)" if e.astray(name) else ""
        lines.append((f"{row.title}{astray}", *cells))
    known = {row: e.found(e.job("measure", row)) for row in (DENSE_ROW, UNTUNED)}
    means = ", ".join(f"{row} {found['mean']:.5f}" if found else f"{row} {NOT_RUN}" for row, found in known.items())
    controls = ", ".join(
        f"{at(f)} {error:.5f}" for f in e.study.fractions if (error := e.error(CONTROL, f)) is not None
    )
    return (
        _table(("row", *map(at, e.study.fractions)), lines)
        + f"\nFirst line: closure in percent with its 95 % interval. Second line: excess over the control in "
        "thousandths of the velocity error. One run for each budget. Where un-tuned windows cost nothing that could be "
        "told, there is no gap to close. "
        f"Errors: {means}; control: {controls or NOT_RUN}.\n"
    )


def bands_table(e: Evidence) -> str:
    lines = []
    for name in _trained(e):
        for fraction in e.study.first:
            curve = e.curve(name, fraction)
            if curve is None:
                continue
            cells = [
                f"{percent(curve.closure(band))}<br>{1000 * curve.excess(band).value:+.2f}"
                for band in BANDS
                if band != "whole"
            ]
            lines.append((e.study.row(name).title, at(fraction), *cells))
    heads = (f"{band} noise" for band in BANDS if band != "whole")
    return _table(("row", "budget", *heads), lines) if lines else f"{NOT_RUN}.\n"


def sweep_table(e: Evidence) -> str:
    """Where plain LoRA stops, from mild to severe windows."""
    fraction, lines = e.study.first[0], []
    for plan in PLANS:
        rows = [e.study.under(name, plan) for name in (FULL, PLAIN)]
        if all(rows):
            full, lora = (row.name for row in rows if row)
            loss = e.untuned_loss(e.study.row(full).reference)
            both = [closed(e.curve(row, fraction)) for row in (full, lora)]
            cost = NOT_RUN if loss is None else f"{loss:+.1f} %"
            lines.append((e.study.row(full).plan, cost, *both, points(e.ahead(full, lora, fraction), 100)))
    heads = ("plan", "un-tuned loss", f"full fine-tune at {at(fraction)}", "LoRA of rank 11", "full less LoRA, points")
    return _table(heads, lines)


def two_by_two(e: Evidence) -> str:
    """Resolution transfer and retrofit apart: velocity errors at the high size."""
    fraction = e.study.first[0]

    def cell(row: str) -> str:
        error = e.error(row, fraction) if row in e.study.rows else None
        return NOT_RUN if error is None else f"{error:.5f}"

    lines = [("dense", cell("control-low"), cell(CONTROL)), ("T3", cell("full-low"), cell(FULL))]
    return _table((f"error at the high size, {at(fraction)}", "tuned at the low size", "tuned at the high size"), lines)


def sampled_table(e: Evidence) -> str:
    asked, lines = e.study.adherence, []
    for name in e.study.rows:
        row = e.study.row(name)
        for fraction in (0.0,) if row.measure else e.study.fractions:
            for steps in (asked.steps, *asked.few_steps):
                found = e.shares(name, fraction, steps)
                if found is None:
                    continue
                ahead = [
                    e.share_ahead((name, fraction, steps), (CONTROL, fraction or asked.fraction, asked.steps), word)
                    for word in ("all", "agreement")
                ]
                differences = [f"{points(each[0])}, bound {each[0].lower:+.1f}" if each else NONE for each in ahead]
                shares = f"{found['all']:.1f} %", f"{found['agreement']:.1f} %"
                pace = f"{found['sampling_seconds']:.3f} s"
                budget = at(fraction) if fraction else NONE
                lines.append((row.title, budget, str(steps), *shares, *differences, pace))
    heads = (
        "row",
        "budget",
        "steps",
        "all right",
        "agreement",
        "all, less control",
        "agreement, less control",
        "a clip",
    )
    return _table(heads, lines) if lines else f"{NOT_RUN}.\n"


def against_dense(e: Evidence) -> str:
    """Tuned T3 beside the dense control at equal GPU seconds, equal training clips, equal sampling seconds."""
    lines = []
    for fraction in e.study.fractions:
        curve, equal = e.curve(FULL, fraction), e.at_equal_samples(FULL, fraction)
        seconds = clips = NOT_RUN
        if curve:
            excess = curve.excess()
            seconds = f"{1000 * excess.value:+.2f} [{1000 * excess.low:+.2f}, {1000 * excess.high:+.2f}]"
        if equal:
            clips = (
                "outside of what dense was trained for" if equal[1] is None else f"{1000 * (equal[0] - equal[1]):+.2f}"
            )
        lines.append((at(fraction), seconds, clips))
    text = _table(
        ("budget", "excess at equal GPU seconds, thousandths", "excess at equal training clips, thousandths"), lines
    )
    return f"{text}\n{equal_sampling(e)}\n"


def equal_sampling(e: Evidence) -> str:
    """One sentence: T3 at its steps against dense at the most steps that take no longer."""
    asked = e.study.adherence
    tuned = e.shares(FULL, asked.fraction, asked.steps)
    dense = {steps: e.shares(CONTROL, asked.fraction, steps) for steps in (asked.steps, *asked.few_steps)}
    if tuned is None or not any(dense.values()):
        return f"Equal sampling seconds: {NOT_RUN}."
    within = [
        steps
        for steps, found in dense.items()
        if found and found["sampling_seconds"] <= 1.05 * tuned["sampling_seconds"]
    ]
    if not within:
        return "Equal sampling seconds: dense takes longer at every number of steps that was run."
    steps = max(within)
    compared = e.share_ahead((FULL, asked.fraction, asked.steps), (CONTROL, asked.fraction, steps), "all")
    found = dense[steps]
    assert found is not None
    return (
        f"Equal sampling seconds: T3 at {asked.steps} steps ({tuned['sampling_seconds']:.3f} s a clip) has "
        f"{tuned['all']:.1f} % all right, dense at {steps} steps ({found['sampling_seconds']:.3f} s) "
        f"{found['all']:.1f} %; the difference is {points(compared[0]) if compared else NOT_RUN} points."
    )


def rates_table(e: Evidence) -> str:
    lines = []
    for name in _trained(e, closures=False):
        row, tried = e.study.row(name), e.rates(name)
        best = min(tried, key=lambda rate: tried[rate]) if len(tried) == len(row.rates) else None
        cells = [f"{rate:g}: " + (f"{tried[rate]:.5f}" if rate in tried else NOT_RUN) for rate in row.rates]
        edge = " (at the edge)" if best in (row.rates[0], row.rates[-1]) else ""
        untuned = any(not f["tuned"] for j, f in e.jobs.values() if j.row == name and j.kind == "run")
        chosen = NOT_RUN if best is None else f"{best:g}{edge}"
        lines.append((row.title, *cells, chosen + ("; some runs at the middle rate" if untuned else "")))
    tries = max(len(e.study.row(name).rates) for name in _trained(e))
    heads = ("row", *(f"try {i + 1}" for i in range(tries)), "chosen")
    return (
        _table(heads, lines)
        + f"\nEach try: {at(e.study.tune_fraction)} of pre-training, errors on the split for tuning.\n"
    )


def run_table(e: Evidence) -> str:
    devices: dict[str, list[float]] = {}
    for _, found in e.jobs.values():
        entry = devices.setdefault(found["device"], [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += found.get("training_seconds", 0.0)
        entry[2] += found["wall_seconds"]
    lines = [(name, f"{n:.0f}", f"{steps:.0f}", f"{wall:.0f}") for name, (n, steps, wall) in sorted(devices.items())]
    counts = ", ".join(f"{count} {kind}" for kind, count in e.kinds.items())
    return _table(("device", "jobs", "seconds of steps", "seconds in all"), lines) + f"\nJobs: {counts}.\n"
