"""Rows of results: run one after the other, kept on disk after each, within a bound of time."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import cli
from ..errors import T3Error
from ..files import atomic_path, check_output
from .machine import Ceilings, machine, measure_ceilings, pick_device
from .results_csv import append_row, check_csv
from .tables import table
from .timing import release, round3

FORMAT = 1
# Rows that others need.
ALWAYS = ("floor", "truth")
Figures = Mapping[str, Any]


class Report:
    """Collects rows; each is in the JSON file and in the CSV as soon as it is measured.

    A row belongs to a `table` and a `case`, is called `variant`, and holds figures; or says why it has none
    (`absent`: cannot be had here; `failed`: was tried). Rows that are `peer`s come first in a case: later rows are
    compared with them.
    """

    def __init__(
        self,
        command: list[str],
        *,
        out: Path | None = None,
        csv: Path | None = None,
        seconds: float | None = None,
        only: list[str] | None = None,
        overwrite: bool = False,
        tiny: bool = False,
    ) -> None:
        """Checks both files before any work.

        seconds: begin no row after so long, since now. only: rows whose name has one of these words, and floors.
        """
        self.began = time.perf_counter()
        self.out = check_output(out, overwrite) if out else None
        self.csv = csv.absolute() if csv else None
        if self.out and self.out == self.csv:
            raise T3Error(f"--out and --csv are both {self.out}: name two files.")
        if self.csv:
            check_csv(self.csv)
        self.seconds, self.only, self.tiny = seconds, only, tiny
        self._ours = overwrite  # whether what is there under the name of `out` may be replaced
        self.device = pick_device()
        self.ceilings: Ceilings = measure_ceilings(self.device, tiny)
        self.data: dict[str, Any] = {
            "t3_bench": FORMAT,
            "machine": machine(self.device),
            "ceilings": {key: round3(value) for key, value in asdict(self.ceilings).items()},
            "command": shlex.join(["python", "-m", "t3.bench", *command]),
            "rows": [],
            "left_out": [],
        }
        if tiny:
            self.data["tiny"] = "small sizes: these figures say nothing about speed"

    @property
    def left(self) -> float | None:
        """Seconds of the bound that are left, or None without a bound."""
        return None if self.seconds is None else self.seconds - (time.perf_counter() - self.began)

    def wanted(self, variant: str) -> bool:
        """Whether a row was asked for."""
        return not self.only or variant in ALWAYS or any(word in variant for word in self.only)

    def over(self, table: str, case: str, what: str) -> bool:
        """Whether the time is up; if so, `what` is put down as left out."""
        if self.left is None or self.left > 0:
            return False
        self.data["left_out"].append({"table": table, "case": case, "variant": what})
        cli.say(f"left out   {case}: {what} (--seconds {self.seconds:g} are over)")
        self._save()
        return True

    def run(
        self,
        table: str,
        case: str,
        variant: str,
        work: Callable[[], Figures],
        *,
        peer: bool = False,
        note: str | None = None,
    ) -> dict[str, Any] | None:
        """Measure one row and return it; None if it failed, was left out or not asked for. Keeps errors of `work`."""
        if not self.wanted(variant) or self.over(table, case, variant):
            return None
        begin = time.perf_counter()
        figures, problem = {}, ""
        try:
            figures = dict(work())
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        # Only here, with the exception gone, are the tensors it held freed.
        release(self.device)
        if problem:
            self.fail(table, case, variant, problem)
            return None
        return self.take(table, case, variant, figures, peer=peer, note=note, took_s=time.perf_counter() - begin)

    def take(
        self,
        table: str,
        case: str,
        variant: str,
        figures: Figures,
        *,
        peer: bool = False,
        note: str | None = None,
        took_s: float = 0.0,
    ) -> dict[str, Any]:
        """Put down a row that has been measured, in `took_s` seconds; returns it."""
        figures = self._compared(table, case, figures) | dict(figures)
        row = {"table": table, "case": case, "variant": variant, **_rounded(figures)}
        row |= {"peer": True} if peer else {}
        row |= {"note": note} if note else {}
        self._add(row | {"took_s": round(took_s, 1)})
        return row

    def absent(self, table: str, case: str, variant: str, why: str) -> None:
        """A row that cannot be had here, with the reason."""
        if not self.wanted(variant):
            return
        self._add({"table": table, "case": case, "variant": variant, "absent": why})

    def fail(self, table: str, case: str, variant: str, why: str) -> None:
        """A row that was tried and gave no figures."""
        self._add({"table": table, "case": case, "variant": variant, "failed": " ".join(why.split())[:300]})

    def show(self, table_name: str, case: str) -> None:
        """Print the table of a case on standard output."""
        print(table(self.data, table_name, case), flush=True)

    def close(self) -> dict[str, Any]:
        """Say what was left out; returns all results."""
        self._save()
        if self.data["left_out"]:
            count = len(self.data["left_out"])
            print(f"\nLeft out, since --seconds {self.seconds:g} were over: {count} rows.")
            for row in self.data["left_out"]:
                print(f"  {row['table']}: {row['case']}: {row['variant']}")
        if self.out:
            cli.say(f"wrote      {self.out}")
        return self.data

    def _compared(self, table: str, case: str, figures: Figures) -> dict[str, Any]:
        """Percent of the floor, and how many times as fast as each peer measured before in this case."""
        found: dict[str, Any] = {}
        times = {}
        unit = "ms" if "ms" in figures else "seconds"
        for row in self.data["rows"]:
            if (row["table"], row["case"]) != (table, case) or not row.get(unit) or not figures.get(unit):
                continue
            if row["variant"] == "floor":
                found["percent_of_floor"] = 100 * row[unit] / figures[unit]
            elif row.get("peer"):
                times[row["variant"]] = row[unit] / figures[unit]
        return found | ({"times_as_fast_as": times} if times else {})

    def _add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        shown = {k: v for k, v in row.items() if k not in ("table", "case", "variant", "peer", "note", "took_s")}
        cli.say(f"{row['case']}: {row['variant']}: {json.dumps(shown)}")
        if self.csv:
            append_row(self.csv, self.data, row)
        self._save()

    def _save(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.began, 1)
        if self.out:
            # Another run may have begun to write there since the check.
            with atomic_path(self.out, overwrite=self._ours) as path:
                path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            self._ours = True


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _rounded(value.item())
    return round3(value) if isinstance(value, float) else value
