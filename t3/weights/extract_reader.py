"""The two models of an extraction: any two sources of tensors, brought to the same names and compared in shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import T3Error
from .catalogue import name_of_width
from .dialects import DIT
from .files import WeightFile
from .header import ITEM_BITS, TensorInfo
from .identity import Identity, some
from .models import identify
from .write import stored_type, tensor_bytes

if TYPE_CHECKING:
    import torch


_MAPPED = 2**27  # bytes of one file that may be mapped at once, beside a larger tensor


class TensorsByName(WeightFile):
    """A mapping name -> tensor seen as a file of weights: a state dict, or anything that loads on `[name]`.

    Names may be in any dialect of whole models, with nothing beside the transformer's parameters. Each tensor is asked
    for once when this is made (for its shape) and once when it is read, and is not kept.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], name: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        if not tensors:
            raise T3Error(f"{name} holds no tensors.")
        self.path = Path(name)
        self.shards = []
        self.metadata = dict(metadata or {})
        self.container = "memory"
        self._tensors = tensors
        self._info = {key: _info(tensors[key]) for key in tensors}
        self.nbytes = sum(info.nbytes for info in self._info.values())

    def read_raw(self, key: str) -> torch.Tensor:
        """One tensor, wherever it lies."""
        return self._tensors[key].detach()

    def pieces(self, key: str, size: int = 0) -> Iterator[bytes]:
        """The bytes of one tensor, at once."""
        yield tensor_bytes(self.read_raw(key))

    def sibling_config(self) -> dict[str, Any]:
        """Nothing lies beside a mapping."""
        return {}

    def sibling(self, name: str) -> dict[str, Any]:
        """Nothing lies beside a mapping."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def _info(tensor: torch.Tensor) -> TensorInfo:
    dtype = stored_type(tensor.dtype)
    return TensorInfo(dtype, tuple(tensor.shape), tensor.numel() * ITEM_BITS[dtype] // 8)


@dataclass
class Model:
    """One of the two: where its tensors come from, and what it is."""

    file: WeightFile
    found: Identity
    mapped: int = 0

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its canonical name; quantised ones as float32.

        What was read of a file counts as memory of this process until its handle is closed: that is done now and then,
        not each time, since opening reads the header again.
        """
        key = self.found.names[name]
        self.mapped += self.file.info(key).nbytes
        if self.mapped > _MAPPED:
            self.file.close()
            self.mapped = self.file.info(key).nbytes
        return self.file.read(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by its canonical name."""
        return self.file.shape(self.found.names[name])

    def stored(self) -> set[str]:
        """The formats its parameters are stored in."""
        return {self.file.dtype(key) for key in self.found.names.values()}


def open_model(source: WeightFile | Mapping[str, torch.Tensor], role: str) -> Model:
    """Recognise a whole transformer. `role`: "BASE" or "TUNED", for messages.

    Raises T3Error for anything else, and for files whose numbers are not read here (GGUF, int8, mxfp8, ...).
    """
    file = source if isinstance(source, WeightFile) else TensorsByName(source, f"the {role.lower()} model")
    if file.container == "gguf":
        raise T3Error(
            f"{role} {file.path} is a GGUF file. Its quantised tensors are not read here, and their rounding would be "
            "part of the result: use the bf16 or fp16 version of these weights. What is extracted runs on the GGUF too."
        )
    found = identify(file)
    if found.form not in ("full", "unknown"):
        raise T3Error(
            f"{role} {file.path} is an adapter ({found.form}), and extraction compares two whole models. "
            "An adapter needs none: it can be used as it is."
        )
    if found.component not in (DIT, "unknown"):
        raise T3Error(f"{role} {file.path} is a {found.component} ({found.model}), not a Wan transformer.")
    if found.problem:
        raise T3Error(f"{role}: {found.problem}")
    if found.quantised:
        raise T3Error(f"{role}: {found.quantised}")
    return Model(file, found)


def check_pair(base: Model, tuned: Model) -> None:
    """Raise `T3Error` unless both have the same parameters in the same shapes."""
    only_base = [name for name in base.found.names if name not in tuned.found.names]
    only_tuned = [name for name in tuned.found.names if name not in base.found.names]
    shared = [name for name in base.found.names if name in tuned.found.names]
    wrong = [name for name in shared if base.shape(name) != tuned.shape(name)]
    if not (only_base or only_tuned or wrong):
        return
    parts = []
    if wrong:
        name = wrong[0]
        parts.append(
            f"{len(wrong)} shapes differ, first {name!r}: {list(base.shape(name))} and {list(tuned.shape(name))}"
        )
    for names, where in ((only_base, "BASE"), (only_tuned, "TUNED")):
        if names:
            parts.append(f"only {where} has {some(names)}")
    raise T3Error(
        f"BASE {base.file.path} is a {_what(base)} and TUNED {tuned.file.path} is a {_what(tuned)}: {'; '.join(parts)}"
        ". Give the model that TUNED was trained from as BASE."
    )


def _what(model: Model) -> str:
    return f"{model.found.model}, {name_of_width(model.found.width)}"
