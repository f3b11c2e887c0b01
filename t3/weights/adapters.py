"""Apply weights to a loaded transformer: a full checkpoint, a LoRA, a diff, or a LoRA with diffs.

Everything is checked before the first parameter changes: targets, shapes, and that every change is finite. A refused
file leaves the model bit for bit as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import T3Error
from . import layout_dit
from .adapter_file import AdapterFile, Piece, is_adapter, read_adapter, scale_of
from .catalogue import name_of_width
from .dialects import DIT, looks_like
from .files import WeightFile
from .models import PLAN_KEY, Identity, adapter_width, config_width, identify, refused_text, some

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel

_NOUNS = {"lora": "LoRA", "diff": "diff", "lora+diff": "LoRA with diffs", "full": "full checkpoint"}


@dataclass
class ApplyReport:
    """What `apply_weights` did.

    Attributes:
        form: "full", "lora", "diff" or "lora+diff".
        dialect: how the file spells its names.
        matched: number of tensors used.
        changed: canonical names of the parameters that were changed.
        unused: keys that are known and not needed.
        plan: JSON text of the plan the weights were tuned for, or None.
        strength: as asked for.
        notes: things a user should know.
    """

    form: str
    dialect: str
    matched: int
    changed: list[str]
    unused: list[str] = field(default_factory=list)
    plan: str | None = None
    strength: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def tuned(self) -> str:
        """Whether these weights are T3-tuned: "yes" when the file carries its plan, else "cannot tell"."""
        return "yes" if self.plan is not None else "cannot tell"

    def describe(self) -> str:
        """One line for people."""
        unused = f", {len(self.unused)} unused" if self.unused else ""
        line = (
            f"{_NOUNS[self.form]} ({self.dialect} names) at strength {self.strength:g}: {self.matched} tensors onto "
            f"{len(self.changed)} parameters{unused}; T3-tuned: {self.tuned}"
        )
        return "; ".join([line, *self.notes])


def apply_weights(transformer: WanTransformer3DModel, file: WeightFile, strength: float = 1.0) -> ApplyReport:
    """Change a transformer's parameters in place by what a file holds, times `strength`.

    Full checkpoints move every parameter from its value towards the file's (1 replaces it). Diffs add `strength *
    diff`. LoRAs add `strength * alpha / rank * up @ down`. Sums are float32 and rounded to the parameter's dtype once.

    Args:
        transformer: a diffusers `WanTransformer3DModel`, any dtype and device, not fused or quantised.
        file: from `open_weights`.
        strength: any finite number; 0 checks the file and changes nothing.

    Raises:
        T3Error: a key has no target, a shape does not fit, a tensor is missing or not finite. Nothing is changed then.
    """
    if not math.isfinite(strength):
        raise T3Error(f"Strength {strength} is no finite number; 1 is the usual value.")
    targets = _targets(transformer)
    plan = file.metadata.get(PLAN_KEY)
    if is_adapter(file):
        adapter = read_adapter(file)
        _check_adapter(transformer, file, adapter, targets)
        changes = _adapter_changes(file, adapter, strength)
        report = ApplyReport(adapter.form, adapter.dialect, len(adapter.matched), list(changes), [], plan, strength)
        report.notes = adapter.notes
    else:
        found = identify(file)
        _check_full(transformer, file, found, targets)
        changes = {name: _towards(file, found.names[name], strength) for name in targets}
        report = ApplyReport("full", found.dialect, len(found.matched), list(changes), found.unused, plan, strength)
    _check_results(file, targets, changes)
    if strength == 0:
        report.changed = []
    else:
        _store(targets, changes)
    return report


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


_Change = Callable[["torch.Tensor"], "torch.Tensor"]  # parameter -> result; both float32 (float64 for a float64 model)


def _towards(file: WeightFile, key: str, strength: float) -> _Change:
    def change(base: torch.Tensor) -> torch.Tensor:
        tuned = file.read(key).to(device=base.device, dtype=base.dtype)
        return tuned if strength == 1 else base + strength * (tuned - base)

    return change


def _adapter_changes(file: WeightFile, adapter: AdapterFile, strength: float) -> dict[str, _Change]:
    by_target: dict[str, list[Piece]] = {}
    for piece in adapter.pieces:
        by_target.setdefault(piece.target, []).append(piece)

    def adding(pieces: list[Piece]) -> _Change:
        def change(base: torch.Tensor) -> torch.Tensor:
            for piece in pieces:
                base = base + strength * piece_delta(file, piece, base)
            return base

        return change

    return {target: adding(pieces) for target, pieces in by_target.items()}


def piece_delta(file: WeightFile, piece: Piece, like: torch.Tensor) -> torch.Tensor:
    """The change one piece makes at strength 1, in the shape, dtype and device of `like`."""

    def read(role: str) -> torch.Tensor:
        return file.read(piece.keys[role]).to(device=like.device, dtype=like.dtype)

    scale = scale_of(file, piece)

    if piece.kind != "lora":
        return scale * read("diff").reshape(like.shape)
    up, down = read("up"), read("down")
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(like.shape)


def _result(parameter: torch.nn.Parameter, change: _Change) -> torch.Tensor:
    import torch

    exact = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return change(parameter.detach().to(exact)).to(parameter.dtype)


def _check_results(file: WeightFile, targets: dict[str, torch.nn.Parameter], changes: dict[str, _Change]) -> None:
    """Compute every result once to see that it is finite, and keep none.

    `_store` computes them again: twice the arithmetic instead of a second copy of the model.
    """
    import torch

    for name, change in changes.items():
        if not torch.isfinite(_result(targets[name], change).float()).all():
            raise T3Error(
                f"{file.path}: the result for {name!r} is not finite (NaN, infinite, or too large for "
                f"{targets[name].dtype}). The file is damaged or the strength too high; nothing was changed."
            )


def _store(targets: dict[str, torch.nn.Parameter], changes: dict[str, _Change]) -> None:
    import torch

    with torch.no_grad():
        for name, change in changes.items():
            targets[name].copy_(_result(targets[name], change))


def _check_full(transformer: Any, file: WeightFile, found: Identity, targets: dict[str, torch.nn.Parameter]) -> None:
    if found.component not in (DIT, "unknown"):
        raise T3Error(f"{file.path} is a {found.component} ({found.model}), not weights for a Wan transformer.")
    if found.problem:
        raise T3Error(found.problem)
    other = [name for name in targets if name not in found.names] + [n for n in found.names if n not in targets]
    shapes = {
        name: (file.shape(found.names[name]), tuple(targets[name].shape)) for name in targets if name not in other
    }
    wrong = [f"{name!r} is {list(a)} and needs {list(b)}" for name, (a, b) in shapes.items() if a != b]
    if other or wrong:
        have, want = found.width, config_width(transformer.config)
        first = f"{wrong[0]}" if wrong else f"only one of the two has {some(other)}"
        sizes = _sizes("This checkpoint", have, want) if have != want else ""
        raise T3Error(
            f"{file.path} does not fit the loaded model: {sizes}{len(wrong) + len(other)} tensors differ, "
            f"first {first}."
        )


def _sizes(what: str, have: int | None, want: int) -> str:
    return f"{what} is for a model {name_of_width(have)}; the loaded model is {name_of_width(want)}. "


def _check_adapter(
    transformer: Any, file: WeightFile, adapter: AdapterFile, targets: dict[str, torch.nn.Parameter]
) -> None:
    if adapter.refused or not adapter.pieces:
        guess = "" if adapter.pieces else looks_like(file.keys())
        raise T3Error(refused_text(file, adapter.refused, guess))
    absent = [piece.target for piece in adapter.pieces if piece.target not in targets]
    wrong = []
    for piece in adapter.pieces:
        if piece.target in targets and (odd := _misfit(file, piece, tuple(targets[piece.target].shape))):
            wrong.append(odd)
    if not absent and not wrong:
        return
    noun, have, want = _NOUNS[adapter.form], adapter_width(file, adapter), config_width(transformer.config)
    parts = []
    if have is not None and have != want:
        parts.append(_sizes(f"This {noun}", have, want).rstrip(". "))
    if wrong:
        parts.append(f"{len(wrong)} shapes do not fit, first {wrong[0]}")
    if absent:
        layers = transformer.config.num_layers
        deeper = f" (it has {layers} blocks, the {noun} goes to {adapter.layers})" if adapter.layers > layers else ""
        parts.append(f"{len(absent)} parameters are not in the loaded model{deeper}, first {some(absent)}")
    raise T3Error(f"{file.path} does not fit the loaded model: {'; '.join(parts)}.")


def _misfit(file: WeightFile, piece: Piece, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a piece's shapes for a parameter of `shape`, or None."""
    if piece.kind != "lora":
        have = file.shape(piece.keys["diff"])
        fits = have == shape
        return None if fits else f"{piece.keys['diff']!r} is {list(have)} and {piece.target!r} is {list(shape)}"
    up, down = file.shape(piece.keys["up"]), file.shape(piece.keys["down"])
    flat = len(up) >= 2 and len(down) >= 2 and math.prod(up[1:]) == down[0]
    fits = flat and len(shape) >= 2 and up[0] == shape[0] and math.prod(down[1:]) == math.prod(shape[1:])
    if fits:
        return None
    return f"{piece.keys['up']!r} {list(up)} times A {list(down)} does not make {piece.target!r} {list(shape)}"
