"""What T3 tools write into a safetensors header, and read from it.

All values are text, as the format asks:

    t3.version  version of this list, "1"; a reader refuses a newer one
    t3.plan     the plan the weights were tuned for, `Plan.to_json`
    t3.grid     the grid they were tuned on, "[21, 136, 240]"; the plan's own where absent
    t3.base     the base model they belong on, `Fingerprint.to_json`
    t3.rank     the highest rank of the LoRA, "64"; absent for full weights
    t3.writer   name and version of the program that wrote the file

Every entry may be absent. A plan says that the weights are T3-tuned; nothing else does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import T3Error
from ..plan import Grid, Plan
from .fingerprint import Fingerprint

VERSION = 1
PREFIX = "t3."
PLAN_KEY = "t3.plan"
KEYS = ("t3.version", PLAN_KEY, "t3.grid", "t3.base", "t3.rank", "t3.writer")


@dataclass(frozen=True)
class T3Metadata:
    """The entries above as values. `others`: names of further `t3.` entries, which mean nothing here."""

    plan: Plan | None = None
    grid: Grid | None = None
    base: Fingerprint | None = None
    rank: int | None = None
    writer: str | None = None
    others: tuple[str, ...] = field(default=())

    @property
    def tuned(self) -> str:
        """Whether the weights are T3-tuned: "yes" when they carry their plan, else "cannot tell"."""
        return "yes" if self.plan is not None else "cannot tell"

    @property
    def trained_grid(self) -> Grid | None:
        """The grid the weights were tuned on, as far as the file says."""
        return self.grid or (self.plan.grid if self.plan else None)

    def to_header(self) -> dict[str, str]:
        """Entries for a safetensors header; `read_metadata` gives an equal value back."""
        entries = {
            PLAN_KEY: self.plan.to_json() if self.plan else None,
            "t3.grid": json.dumps(self.grid) if self.grid else None,
            "t3.base": self.base.to_json() if self.base else None,
            "t3.rank": None if self.rank is None else str(self.rank),
            "t3.writer": self.writer,
        }
        present = {key: value for key, value in entries.items() if value is not None}
        return {"t3.version": str(VERSION), **present} if present else {}

    def describe(self) -> list[str]:
        """Lines for people; none where the file says nothing."""
        lines = []
        if self.plan:
            lines.append(
                f"plan {self.plan.name!r} of {len(self.plan.layers)} layers, for a grid of {_by(self.plan.grid)}"
            )
        if self.grid:
            lines.append(f"trained on a grid of {_by(self.grid)}")
        if self.base:
            lines.append(f"base {self.base.describe()}")
        if self.rank is not None:
            lines.append(f"rank up to {self.rank}")
        if self.writer:
            lines.append(f"written by {self.writer}")
        if self.others:
            lines.append(f"entries with no meaning here: {', '.join(self.others)}")
        return lines


def read_metadata(header: Mapping[str, str], where: str | Path) -> T3Metadata:
    """Read and check the T3 entries of a safetensors header.

    Args:
        header: the file's metadata; entries of other programs are left alone.
        where: the file, for messages.

    Raises:
        T3Error: an entry cannot be read. Nothing is guessed: a plan that is wrong would give noise.
    """
    others = tuple(sorted(key for key in header if key.startswith(PREFIX) and key not in KEYS))

    def read(key: str, parse: Any) -> Any:
        if key not in header:
            return None
        try:
            return parse(header[key])
        except T3Error as error:
            reason = str(error)
        except (ValueError, TypeError, RecursionError):
            reason = f"it is {header[key][:60]!r}"
        raise T3Error(
            f"{where}: its metadata entry `{key}` cannot be used: {reason.rstrip('.')}. Export the file again with the "
            "tool that wrote it."
        )

    read("t3.version", _version)
    return T3Metadata(
        plan=read(PLAN_KEY, Plan.from_json),
        grid=read("t3.grid", _grid),
        base=read("t3.base", Fingerprint.from_json),
        rank=read("t3.rank", _rank),
        writer=header.get("t3.writer"),
        others=others,
    )


def _version(text: str) -> int:
    version = int(text)
    if not 1 <= version <= VERSION:
        raise T3Error(f"it is version {version}, and this release reads up to {VERSION}")
    return version


def _grid(text: str) -> Grid:
    sizes = json.loads(text)
    if not isinstance(sizes, list) or len(sizes) != 3 or any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError
    return Grid(*sizes)


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 0:
        raise ValueError
    return rank


def _by(grid: Grid) -> str:
    return " x ".join(map(str, grid))
