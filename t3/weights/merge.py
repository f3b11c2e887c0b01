"""A base with weights applied, as one more file of weights: what `respell` and `write_safetensors` take.

Nothing is computed until a tensor is asked for, and nothing is kept, so a model of any kind and size is merged in the
memory of a few of its tensors. The sums are those that `apply_weights` does on a loaded model, by the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import T3Error
from .adapters import ApplyReport, Change, checked_result, other_base, read_changes
from .files import WeightFile
from .header import ITEM_BITS, TensorInfo
from .identity import Identity
from .scales import is_companion, rename_layers
from .write import TORCH_TYPES, Entry, tensor_bytes

if TYPE_CHECKING:
    import torch

# What 8-bit tensors become where anything is applied: a change of a few per cent is less than half a step of 8 bits and
# would be rounded away. All of them do, since the host loads a model in one format, that of most of its tensors.
WIDENED = "BF16"


@dataclass
class Step:
    """One applied file: its changes by canonical parameter name, and the report on it."""

    file: WeightFile
    changes: dict[str, Change]
    report: ApplyReport


class MergedFile(WeightFile):
    """A whole transformer after other files, applied one after the other, each at its strength.

    Names, order and metadata are the base's. A tensor that no file changes is the base's, byte for byte; at strength 0
    that is every tensor. The others are rounded to the base's format after each file, as the parameters of a loaded
    model are.

    Attributes:
        steps: the files.
        changed: canonical names of the parameters that differ from the base's.
        used_up: keys of the base that said how 8-bit tensors are scaled, and have no place here.
        notes: things a user should know.
    """

    def __init__(self, base: WeightFile, found: Identity, files: Sequence[tuple[WeightFile, float]]) -> None:
        """`found`: what `identify` says of the base; `files`: with the strength of each, in order.

        Raises T3Error when the base's numbers are not read here, a file does not fit it, or a strength is no finite
        number.
        """
        if found.quantised:
            raise T3Error(f"BASE {found.quantised}")
        self.path, self.shards, self.container = base.path, [], base.container
        self._base = base
        self._keys = found.names
        self._names = {key: name for name, key in found.names.items()}
        shapes = {name: base.shape(key) for name, key in found.names.items()}
        self.steps = [Step(file, *read_changes(file, shapes, strength)) for file, strength in files]
        self.changed = {name for step in self.steps for name in step.report.changed}
        self._read = {name for step in self.steps for name in step.changes}
        self._widened = {key for key in self._names if self.changed and ITEM_BITS[base.dtype(key)] < 16}
        stems = {key.removesuffix(".weight") for key in self._widened}
        marks = {f"{found.prefix}scaled_fp8"} if stems else set()
        self.used_up = [
            key for key in base if is_companion(key, base) and (key.rpartition(".")[0] in stems or key in marks)
        ]
        self.metadata = rename_layers(base, lambda stem: None if stem in stems else stem)
        self._info = {key: self._info_of(key) for key in base if key not in set(self.used_up)}
        self.nbytes = sum(info.nbytes for info in self._info.values())
        self.notes = self._on_widening()
        for i, step in enumerate(self.steps):
            # What a file meets is what those before it left.
            before = functools.partial(self._value, steps=i)
            step.report.notes += other_base(step.report, found.config or {}, found.names, before)

    def _info_of(self, key: str) -> TensorInfo:
        info = self._base.info(key)
        if key not in self._widened:
            return info
        return TensorInfo(WIDENED, info.shape, info.nbytes * ITEM_BITS[WIDENED] // ITEM_BITS[info.dtype])

    def _on_widening(self) -> list[str]:
        if not self._widened:
            return []
        formats = ", ".join(sorted({self._base.dtype(key) for key in self._widened}))
        scaled = f", multiplied by their scales (of which {len(self.used_up)} keys are gone)" if self.used_up else ""
        return [
            f"the base has {len(self._widened)} tensors in 8 bits ({formats}): written as bfloat16{scaled}, since 8 "
            "bits would round away most of what is merged in"
        ]

    def read_raw(self, key: str) -> torch.Tensor:
        """One tensor as it will be stored, on the CPU."""
        return Entry(key, self.dtype(key), self.shape(key), lambda: self.pieces(key)).tensor()

    def pieces(self, key: str, size: int = 16 * 2**20) -> Iterator[bytes]:
        """The bytes of one tensor after all files; those that are the base's come `size` at a time.

        Raises T3Error when a file makes a number of it that is not finite; at strength 0 too, as on a loaded model.
        """
        name = self._names.get(key)
        merged = None if name is None or not (name in self._read or key in self._widened) else self._value(name)
        if merged is None or not (name in self.changed or key in self._widened):
            yield from self._base.pieces(key, size)
        else:
            yield tensor_bytes(merged)

    def _value(self, name: str, steps: int | None = None) -> torch.Tensor:
        """A parameter after the first so many files; after all of them for None."""
        import torch

        key = self._keys[name]
        tensor = self._base.read(key)
        if key in self._widened:
            tensor = tensor.to(getattr(torch, TORCH_TYPES[WIDENED]))
        for step in self.steps[:steps]:
            if name in step.changes:
                result = checked_result(step.file, name, tensor, step.changes[name])
                tensor = result if step.report.strength else tensor
        self.close()  # what was read of a file counts as memory of this process until then
        return tensor

    def close(self) -> None:
        """Forget the open handles of all files."""
        for file in (self._base, *(step.file for step in self.steps)):
            file.close()
