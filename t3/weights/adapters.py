"""Apply weights to a loaded transformer: a full checkpoint, a LoRA or one of its relatives, a diff, or a mix of them.

Everything is checked before the first parameter changes: targets, shapes, and that every change is finite. A refused
file leaves the model bit for bit as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import T3Error
from . import layout_dit
from .adapter_file import AdapterFile, Piece, scale_of
from .arithmetic import Shape, changed
from .catalogue import transformer_name
from .files import WeightFile
from .fingerprint import fingerprint
from .fit import check_fit, noun_of
from .identity import some
from .metadata import T3Metadata
from .models import identify

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel


Change = Callable[["torch.Tensor"], "torch.Tensor"]  # parameter -> result; both float32 (float64 for a float64 model)


@dataclass
class ApplyReport:
    """What `apply_weights` did.

    Attributes:
        form, dialect: as in `Identity`.
        matched: number of tensors used.
        changed: canonical names of the parameters that were changed.
        unused: keys that are known and not needed.
        t3: the file's T3 metadata: plan, base, rank.
        strength: as asked for.
        notes: things a user should know.
    """

    form: str
    dialect: str
    matched: int
    changed: list[str]
    unused: list[str] = field(default_factory=list)
    t3: T3Metadata = field(default_factory=T3Metadata)
    strength: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> str | None:
        """JSON text of the plan the weights were tuned for, or None."""
        return self.t3.plan.to_json() if self.t3.plan else None

    @property
    def tuned(self) -> str:
        """Whether these weights are T3-tuned: "yes" when the file carries its plan, else "cannot tell"."""
        return self.t3.tuned

    def describe(self) -> str:
        """One line for people."""
        unused = f", {len(self.unused)} unused" if self.unused else ""
        line = (
            f"{noun_of(self.form)} ({self.dialect} names) at strength {self.strength:g}: {self.matched} tensors onto "
            f"{len(self.changed)} parameters{unused}; T3-tuned: {self.tuned}"
        )
        return "; ".join([line, *self.notes])


def apply_weights(transformer: WanTransformer3DModel, file: WeightFile, strength: float = 1.0) -> ApplyReport:
    """Change a transformer's parameters in place by what a file holds, times `strength`.

    Full checkpoints and replaced weights move a parameter from its value towards the file's (1 replaces it). Adapters
    add what `arithmetic` says. Sums are float32 and rounded to the parameter's dtype once.

    Args:
        transformer: a diffusers `WanTransformer3DModel`, any dtype and device, not fused or quantised.
        file: from `open_weights`.
        strength: any finite number; 0 checks the file and changes nothing.

    Raises:
        T3Error: a key has no target, a shape does not fit, a tensor is missing or not finite. Nothing is changed then.
    """
    targets = _targets(transformer)
    changes, report = read_changes(file, {name: tuple(param.shape) for name, param in targets.items()}, strength)
    report.notes += other_base(report, transformer.config, targets, targets.__getitem__)
    # Every result is computed once to see that it is finite, and none kept; `_store` computes them again: twice the
    # arithmetic instead of a second copy of the model.
    for name, change in changes.items():
        checked_result(file, name, targets[name], change)
    if strength != 0:
        _store(targets, changes)
    return report


def read_changes(
    file: WeightFile, shapes: Mapping[str, Shape], strength: float
) -> tuple[dict[str, Change], ApplyReport]:
    """What a file does to a model: canonical parameter name -> change, and the report. No tensor is read yet.

    Args:
        file, strength: as for `apply_weights`.
        shapes: canonical parameter name -> shape, of the whole model.

    Raises:
        T3Error: the strength is no finite number, or the file does not fit the model.
    """
    if not math.isfinite(strength):
        raise T3Error(f"Strength {strength} is no finite number; 1 is the usual value.")
    found = identify(file)
    check_fit(file, found, shapes)
    if found.adapter:
        changes = _adapter_changes(file, found.adapter, strength)
    else:
        changes = {name: _towards(file, found.names[name], strength) for name in shapes}
    report = ApplyReport(found.form, found.dialect, len(found.matched), [], found.unused, found.t3, strength)
    report.changed = [] if strength == 0 else list(changes)
    report.notes = list(found.adapter.notes) if found.adapter else []
    return changes, report


def other_base(
    report: ApplyReport, config: Mapping[str, Any], names: Iterable[str], read: Callable[[str], torch.Tensor]
) -> list[str]:
    """A warning when a file says that it belongs on other weights than those of this config that `read` gives."""
    base = report.t3.base
    if base is None or report.form == "full":
        return []
    loaded = fingerprint(transformer_name(dict(config)), names, read)
    if loaded is None or base.fits(loaded):
        return []
    return [
        f"WARNING: made for another base ({base.describe()}) than the one loaded ({loaded.describe()}); expect noise"
    ]


def _targets(transformer: Any) -> dict[str, torch.nn.Parameter]:
    """Canonical name -> parameter of the loaded model."""
    targets, strange = {}, []
    for name, parameter in transformer.named_parameters():
        original = layout_dit.to_original(name)
        if original is None:
            strange.append(name)
        else:
            targets[original] = parameter
    if strange:
        raise T3Error(
            f"Weights must be applied to a plain Wan transformer, before fusing projections or adding adapters: this "
            f"one has {len(strange)} other parameters, first {some(strange)}."
        )
    return targets


def _towards(file: WeightFile, key: str, strength: float) -> Change:
    def change(base: torch.Tensor) -> torch.Tensor:
        tuned = file.read(key).to(device=base.device, dtype=base.dtype)
        return changed("set", {"set": tuned}, base, strength=strength)

    return change


def _adapter_changes(file: WeightFile, adapter: AdapterFile, strength: float) -> dict[str, Change]:
    by_target: dict[str, list[Piece]] = {}
    for piece in adapter.pieces:
        by_target.setdefault(piece.target, []).append(piece)

    def applying(pieces: list[Piece]) -> Change:
        def change(base: torch.Tensor) -> torch.Tensor:
            for piece in pieces:
                base = apply_piece(file, piece, base, strength)
            return base

        return change

    return {target: applying(pieces) for target, pieces in by_target.items()}


def apply_piece(file: WeightFile, piece: Piece, base: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """A parameter after one piece, in the dtype and on the device of `base`, which stays as it was."""
    parts = piece.read(file, base)
    return changed(piece.kind, parts, base, scale=scale_of(file, piece), strength=strength)


def _result(parameter: torch.Tensor, change: Change) -> torch.Tensor:
    import torch

    exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return change(parameter.detach().to(exact)).to(parameter.dtype)


def checked_result(file: WeightFile, name: str, parameter: torch.Tensor, change: Change) -> torch.Tensor:
    """A parameter after a change of `read_changes`, summed in float32 and rounded to the parameter's dtype once.

    Raises T3Error when a number of it is not finite.
    """
    import torch

    result = _result(parameter, change)
    if not torch.isfinite(result.float()).all():
        raise T3Error(
            f"{file.path}: the result for {name!r} is not finite (NaN, infinite, or too large for "
            f"{parameter.dtype}). The file is damaged or the strength too high; nothing was changed."
        )
    return result


def _store(targets: dict[str, torch.nn.Parameter], changes: dict[str, Change]) -> None:
    import torch

    with torch.no_grad():
        for name, change in changes.items():
            targets[name].copy_(_result(targets[name], change))
