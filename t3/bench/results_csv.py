"""One CSV file for all runs: a line for each figure, added to and never rewritten."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import T3Error

COLUMNS = ("date", "machine", "torch", "command", "table", "case", "variant", "metric", "value")
# Of a row, what is no figure; and how long it took to measure, which says nothing about what was measured.
_NAMES = ("table", "case", "variant", "peer", "note", "took_s", "size", "mode")


def check_csv(path: Path) -> Path:
    """The absolute path, if lines can be added to the file (it is made where it is missing).

    Raises `T3Error` for a file with other columns or a place that cannot be written.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            first = next(csv.reader([text.partition("\n")[0]]), []) if text else list(COLUMNS)
            if not text:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)
            elif tuple(first) == COLUMNS and not text.endswith("\n"):
                # An editor's, or a full disk's: the next line would run into it.
                file.write("\n")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise T3Error(f"--csv {path} cannot be written ({error}). Choose another path.") from error
    if tuple(first) != COLUMNS:
        raise T3Error(f"--csv {path} has the columns {first}, not {list(COLUMNS)}. Choose another path.")
    return path


def append_row(path: Path, data: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Add a line for each figure of a row; text (a failure, a choice) is a figure too."""
    found = data["machine"]
    start = [found["date"], found["machine"], found["torch"], data["command"]]
    with path.open("a", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        for metric, value in figures(row):
            lines.writerow([*start, row["table"], row["case"], row["variant"], metric, value])


def figures(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`(metric, value)` of each figure of a row; those of lists and tables are numbered and named."""
    for key, value in row.items():
        if key in _NAMES or value is None:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key}, {name}", item) for name, item in value.items())
        elif isinstance(value, list):
            yield from ((f"{key}, {number}", item) for number, item in enumerate(value))
        else:
            yield key, value
