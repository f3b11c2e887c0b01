"""Results as Markdown tables, for the screen and for the docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .machine import machine_line
from .paying import SHORT, paying

HEADS = {
    "attention_ms": "attention, ms",
    "over_t3_attention": "attention over T3's",
    "forward_s": "forward, s",
    "over_t3_forward": "forward over T3's",
    "forward": "",
    "ms": "ms",
    "seconds": "s",
    "percent_of_floor": "% of floor",
    "percent_of_copy": "% of copy",
    "tb_s": "TB/s",
    "tflops": "TFLOP/s",
    "tokens": "tokens",
    "error": "error",
    "peak_gib": "peak, GiB",
    "activations_gib": "beside weights, GiB",
    "held_gib": "held, GiB",
    "psnr_db": "PSNR, dB",
}
# Of each kind of figure a table has one column, or one for each entry.
_SKIP = {"table", "case", "variant", "peer", "note", "took_s", "absent", "failed", "size", "mode"}


def table(data: Mapping[str, Any], name: str, case: str) -> str:
    """Markdown of one case of one table, under the machine line. Rows without figures say why."""
    rows = [row for row in data["rows"] if (row["table"], row["case"]) == (name, case)]
    columns: list[tuple[str, Any]] = []  # key, and which entry of it
    for row in rows:
        for column in _columns(row):
            if column not in columns:
                columns.append(column)
    columns.sort(key=_place)
    heads = ["", *(_head(key, entry) for key, entry in columns)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    notes = []
    for row in rows:
        label = row["variant"]
        if row.get("note"):
            if row["note"] not in notes:
                notes.append(row["note"])
            label += f" ({notes.index(row['note']) + 1})"
        why = row.get("failed") or row.get("absent")
        if why:
            lines.append(f"| {label} | {'failed: ' if 'failed' in row else ''}{why.replace('|', '/')} |")
        else:
            lines.append(f"| {label} | {' | '.join(_cell(row, *column) for column in columns)} |")
    text = [f"\n{name}: {case}", machine_line(data["machine"], data["ceilings"])]
    text += [data["tiny"]] if data.get("tiny") else []
    text += ["", *lines] + [f"({number}) {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(text)


def all_tables(data: Mapping[str, Any]) -> str:
    """Every table of a file of results."""
    cases = dict.fromkeys((row["table"], row["case"]) for row in data["rows"])
    text = [f"`{data['command']}`, {data.get('seconds', 0):g} s", *(table(data, *case) for case in cases)]
    text += [paying(data)] if any(row["table"] == SHORT for row in data["rows"]) else []
    if data["left_out"]:
        left = "; ".join(f"{row['case']}: {row['variant']}" for row in data["left_out"])
        text.append(f"\nLeft out when the time was up: {left}")
    return "\n".join(text)


def number(value: Any) -> str:
    """For people: three digits, or all before the point."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, (int, float)):
        if value and abs(value) < 1e-2:
            return f"{value:.2g}"
        return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/")


def _columns(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in row.items():
        if key in _SKIP:
            continue
        if isinstance(value, Mapping):
            found += [(key, entry) for entry in value]
        elif isinstance(value, list):
            found += [(key, entry) for entry in range(len(value))]
        else:
            found.append((key, None))
    return found


def _place(column: tuple[str, Any]) -> tuple[int, int]:
    order = ["tokens", "windows", "layer_ms", *HEADS, "times_as_fast_as"]
    key, entry = column
    place = order.index(key if key in order else "error")
    return place, entry if isinstance(entry, int) else 0


def _head(key: str, entry: Any) -> str:
    if key == "times_as_fast_as":
        return f"x {entry}"
    if key == "layer_ms":
        return f"layer {entry}, ms"
    text = HEADS.get(key, key.replace("_", " "))
    return text if entry is None else f"{text} {entry}"


def _cell(row: Mapping[str, Any], key: str, entry: Any) -> str:
    value = row.get(key)
    if entry is None:
        return number(value)
    if isinstance(value, Mapping):
        return number(value.get(entry))
    if isinstance(value, list) and isinstance(entry, int) and entry < len(value):
        return number(value[entry])
    return ""
