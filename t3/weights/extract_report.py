"""What an extraction found and wrote, as values and as words."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .metadata import T3Metadata

_TELL_LARGE = 0.5  # of the tuned model's size
BF16_ROUNDING = 0.0017  # of a weight, root mean square


@dataclass(frozen=True)
class Change:
    """What was written for one parameter.

    Attributes:
        name: canonical parameter name.
        form: "lora", or "diff" for the whole difference.
        rank: 0 for differences.
        error: relative Frobenius error of the change as it is stored.
        norm: Frobenius norm of the change; `relative`: the same over that of the base, None where the base is 0.
        nbytes: bytes in the file.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    rank: int
    error: float
    norm: float
    relative: float | None
    nbytes: int

    def describe(self) -> str:
        """One line for people."""
        what = f"rank {self.rank}" if self.form == "lora" else "diff"
        of = "of a weight that was 0" if self.relative is None else f"{100 * self.relative:.2g} % of the weight"
        return f"{self.name}: {what}, error {self.error:.2g}, change {of}"


@dataclass
class Extraction:
    """The result of `extract`.

    Attributes:
        notes: what a user should know.
        metadata: what the file says of itself.
        tensors: parameters compared; `matrices`: those that low rank may hold.
        path: the file; None for a dry run. `nbytes`: its size.
        changes: one for each parameter that changed; `unchanged`: names of the others.
        missed: layers whose error is above the asked one, because of `max_rank`.
        error: relative Frobenius error of all changes together.
    """

    notes: list[str]
    metadata: T3Metadata
    tensors: int
    tuned_bytes: int
    matrices: int = 0
    path: Path | None = None
    nbytes: int = 0
    changes: list[Change] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    missed: list[Change] = field(default_factory=list)
    error: float = 0.0
    seconds: float = 0.0

    def describe(self) -> list[str]:
        """Lines for people."""
        lines = []
        loras = [change for change in self.changes if change.form == "lora"]
        diffs = [change for change in self.changes if change.form == "diff"]
        if loras:
            ranks = [change.rank for change in loras]
            lines.append(
                f"lora       {len(loras)} layers, rank {min(ranks)} to {max(ranks)}, median "
                f"{statistics.median(ranks):g}; {_size(sum(c.nbytes for c in loras))}"
            )
        if diffs:
            lines.append(f"diff       {len(diffs)} parameters in full; {_size(sum(c.nbytes for c in diffs))}")
        if self.unchanged:
            lines.append(f"unchanged  {len(self.unchanged)} parameters, left out")
        if self.changes:
            worst = max(self.changes, key=lambda change: change.error)
            lines.append(f"error      {self.error:.3g} of the whole change, at most {worst.error:.3g} ({worst.name})")
        lines += [f"metadata   {line}" for line in self.metadata.describe()]
        lines += [f"note       {note}" for note in self.notes]
        return lines

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "ok": True,
            "out": self.path and str(self.path),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 2),
            "error": self.error,
            "tensors": self.tensors,
            "matrices": self.matrices,
            "unchanged": self.unchanged,
            "missed": [change.name for change in self.missed],
            "metadata": self.metadata.to_header(),
            "notes": self.notes,
            "changes": [vars(change) for change in self.changes],
        }


def finish(result: Extraction, target: float | None, rounding: float, seconds: float) -> None:
    """Fill in what is known once the file is there.

    Args:
        target: the error every layer had to meet, or None.
        rounding: what the number formats of both files put into a change, relative to the weight.
    """
    assert result.path is not None
    result.seconds, result.nbytes = seconds, result.path.stat().st_size
    lost = sum((change.error * change.norm) ** 2 for change in result.changes)
    result.error = math.sqrt(lost / sum(change.norm**2 for change in result.changes))
    if target is not None:
        result.missed = [change for change in result.changes if change.error > target]
        matrices = [change for change in result.changes if change.name.endswith(".weight") and len(change.shape) > 1]
        noisy = [change for change in matrices if change.relative and rounding > target * change.relative]
        if noisy:
            result.notes.append(
                f"in {len(noisy)} of {len(matrices)} layers the rounding of bf16 files is over {target:g} of "
                "the change, by estimate, and no low rank holds rounding: compare float32 files if there are any, or "
                "set a highest rank or a larger error"
            )
    if result.missed:
        worst = max(result.missed, key=lambda change: change.error)
        result.notes.append(
            f"WARNING: {len(result.missed)} layers miss the error of {target:g} at the highest rank allowed, worst "
            f"{worst.name} with {worst.error:.2g}: allow a higher rank, or a larger error"
        )
    if result.nbytes > _TELL_LARGE * result.tuned_bytes:
        result.notes.append(
            f"the file is {100 * result.nbytes / result.tuned_bytes:.0f} % of TUNED's size: this change is not of low "
            "rank. A larger error or a highest rank (64 is a usual one) makes it smaller, at a loss that is reported"
        )


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
