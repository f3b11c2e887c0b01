"""Where T3 stops paying: the short clips that `t3.bench growth` measures, in one table for the docs, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .machine import machine_line

SHORT = "short clips"
HEADS = ("size", "frames", "tokens", "attention, dense over T3", "forward, dense over T3", "work, dense over T3")
ABOUT = (
    "Attention: the mean layer of the plan's cycle against a dense layer, both from projections. Forward: the whole "
    "model. Work: multiply-accumulates of a forward pass by the cost model. Below 1 T3 loses."
)


def paying(data: Mapping[str, Any]) -> str:
    """Markdown of every short clip in a file of results, and a sentence for each size; "" where there is none."""
    rows = [row for row in data["rows"] if row["table"] == SHORT and row.get("dense_over_t3")]
    if not rows:
        return ""
    lines = ["\nWhere T3 stops paying", machine_line(data["machine"], data["ceilings"])]
    lines += [data["tiny"]] if data.get("tiny") else []
    lines += ["", f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for row in rows:
        ratios = [row.get(key) for key in ("dense_over_t3", "forward_over_t3", "macs_over_t3")]
        shown = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {row['size']} | {row['frames']} | {row['tokens']:,} | {' | '.join(shown)} |")
    lines += ["", ABOUT]
    lines += [sentence(size, [r for r in rows if r["size"] == size]) for size in dict.fromkeys(r["size"] for r in rows)]
    return "\n".join(lines)


def sentence(size: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """From how many frames on T3 is faster at this size, by the whole forward pass where that was measured."""
    whole = all(row.get("forward_over_t3") for row in rows)
    what, key = ("forward pass", "forward_over_t3") if whole else ("attention", "dense_over_t3")
    rows = sorted(rows, key=lambda row: row["frames"])
    # What follows the last clip at which T3 is not faster.
    lost = [row for row in rows if row[key] <= 1]
    won = [row for row in rows if not lost or row["frames"] > lost[-1]["frames"]]
    if not lost:
        return f"{size}: T3's {what} is faster at every length measured, from {_frames(rows[0])} on."
    if not won:
        return f"{size}: T3's {what} is not faster at any length measured, up to {_frames(rows[-1])}."
    pays = f"{size}: T3 pays from {_frames(won[0])} on ({won[0][key]:.2f} times as fast)"
    return f"{pays}; up to {_frames(lost[-1])} it does not."


def _frames(row: Mapping[str, Any]) -> str:
    return f"{row['frames']} frame{'s' if row['frames'] > 1 else ''}"
