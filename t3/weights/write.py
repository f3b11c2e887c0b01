"""Write a safetensors file one tensor at a time: memory for one, whatever the size of the file."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import T3Error
from ..files import atomic_path, check_output, reason
from .header import ITEM_BITS, MAX_HEADER_BYTES

if TYPE_CHECKING:
    import torch

TORCH_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ALL_TORCH_TYPES = {
    **TORCH_TYPES,
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"},
}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: `pieces` gives its bytes when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    def tensor(self) -> torch.Tensor:
        """The tensor itself, on the CPU, for those who hand it on instead of writing it."""
        import torch

        dtype = getattr(torch, _ALL_TORCH_TYPES[self.dtype])
        raw = bytearray(b"".join(self.pieces()))
        return torch.frombuffer(raw, dtype=dtype).reshape(self.shape) if raw else torch.empty(self.shape, dtype=dtype)


def stored_type(dtype: torch.dtype) -> str:
    """What a safetensors header calls a dtype. Raises T3Error for one that it has no name for."""
    for stored, known in _ALL_TORCH_TYPES.items():
        if f"torch.{known}" == str(dtype):
            return stored
    raise T3Error(f"{dtype} has no place in a safetensors file.")


def tensor_entry(name: str, tensor: torch.Tensor) -> Entry:
    """An entry for a tensor in memory (bfloat16, float16, float32 or float64), on any device."""
    dtype = next(stored for stored, known in TORCH_TYPES.items() if f"torch.{known}" == str(tensor.dtype))
    return Entry(name, dtype, tuple(tensor.shape), lambda: [tensor_bytes(tensor)])


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor as a safetensors file holds them."""
    import torch

    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def write_safetensors(
    path: str | Path, entries: Sequence[Entry], metadata: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Write a whole file or none; returns its absolute path.

    Raises T3Error when the place is taken or not writable, a name is there twice, or a tensor's bytes do not come out
    as many as its shape says.
    """
    entries, head = _laid_out(path, entries, metadata)
    final = check_output(path, overwrite, need_bytes=len(head) + sum(entry.nbytes for entry in entries))
    with atomic_path(final, overwrite) as temp:
        try:
            _write(temp, head, entries)
        except OSError as error:
            raise T3Error(
                f"{final} could not be written ({reason(error)}). Check that disk's free space, or write "
                "to another one."
            ) from error
    return final


def _write(path: Path, head: bytes, entries: Sequence[Entry]) -> None:
    with path.open("wb") as stream:
        stream.write(head)
        for entry in entries:
            before = stream.tell()
            for piece in entry.pieces():
                stream.write(piece)
            if stream.tell() - before != entry.nbytes:
                raise T3Error(
                    f"{entry.name!r} came out as {stream.tell() - before:,} bytes where {entry.dtype} "
                    f"{list(entry.shape)} needs {entry.nbytes:,}; nothing was written."
                )


def is_written(path: str | Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bool:
    """Whether a file holds, byte for byte, what `write_safetensors` would write there."""
    entries, head = _laid_out(path, entries, metadata)
    place = Path(path)
    if not place.is_file() or place.stat().st_size != len(head) + sum(entry.nbytes for entry in entries):
        return False
    with place.open("rb") as stream:
        pieces = itertools.chain([head], itertools.chain.from_iterable(entry.pieces() for entry in entries))
        return all(stream.read(len(piece)) == piece for piece in pieces)


def _laid_out(path: str | Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[Sequence[Entry], bytes]:
    """The entries in the order of the file, and what stands before their data."""
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise T3Error(f"{twice!r} would be written twice to {path}.")
    # Wide types first keeps every tensor aligned to its own item size, which some readers need.
    entries = sorted(entries, key=lambda entry: -ITEM_BITS[entry.dtype])
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in entries:
        end = at + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise T3Error(f"{path} would need a header of {len(raw):,} bytes; the limit is {MAX_HEADER_BYTES:,}.")
    return entries, struct.pack("<Q", len(raw)) + raw
