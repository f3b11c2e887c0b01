"""Read the header of a GGUF file: names, shapes and types of its tensors, enough to say what the model is.

Quantised values are not read here. GGUF bases run in ComfyUI, through the pack that loads them.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import T3Error
from .header import Header, TensorInfo

MAGIC = b"GGUF"
# Number of the type -> name, elements of one block, bytes of one block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
}
PLAIN_TYPES = ("F32", "F16", "BF16", "F64")  # whose values can be read as they lie in the file
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MOST = 10_000_000  # of anything counted in a header; a real model's vocabulary has a quarter of a million entries
# ComfyUI-GGUF notes the shape of tensors with more axes than the format once allowed.
_SHAPE_NOTE = "comfy.gguf.orig_shape."


class _Damaged(ValueError):
    pass


def is_gguf(path: Path) -> bool:
    """Whether a file starts as GGUF files do. False for what cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> Header:
    """Names, types and shapes (in torch's order) of a GGUF file's tensors; its texts as metadata.

    Raises T3Error when the file is damaged or of a version that is not known.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            return _read(path, stream, size)
    except OSError as error:
        raise T3Error(f"Cannot read {path}: {error.strerror or error}.") from error
    except (_Damaged, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise T3Error(f"{path} is a damaged GGUF file ({error}). Download it again.") from error


def _read(path: Path, stream: BinaryIO, size: int) -> Header:
    stream.seek(4)
    version = _number(stream, "<I")
    if version not in (2, 3):
        raise T3Error(f"{path} is a GGUF file of version {version}; versions 2 and 3 are read here.")
    tensors, fields = _count(stream), _count(stream)
    notes = {_text(stream): _value(stream, _number(stream, "<I")) for _ in range(fields)}
    rows = []
    for _ in range(tensors):
        name = _text(stream)
        axes = _number(stream, "<I")
        if axes > 8:
            raise _Damaged(f"{name!r} has {axes} axes")
        sizes = [_number(stream, "<Q") for _ in range(axes)]
        rows.append((name, sizes, _number(stream, "<I"), _number(stream, "<Q")))
    alignment = notes.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _Damaged(f"alignment {alignment!r}")
    start = -(-stream.tell() // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    for name, sizes, kind, offset in rows:
        if name in found:
            raise _Damaged(f"{name!r} is there twice")
        if kind not in TYPES:
            raise _Damaged(f"{name!r} has the unknown type {kind}")
        dtype, elements, block = TYPES[kind]
        count = math.prod(sizes)
        nbytes = -(-count // elements) * block
        if start + offset + nbytes > size:
            raise _Damaged(f"it ends before the data of {name!r}")
        shape = notes.get(_SHAPE_NOTE + name)
        if not isinstance(shape, list) or math.prod(shape) != count:
            shape = sizes[::-1]  # GGUF lists the innermost axis first
        found[name] = TensorInfo(dtype, tuple(shape), nbytes, start + offset)
    texts = {key: value for key, value in notes.items() if isinstance(value, str)}
    return Header(found, texts, "gguf")


def _number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _count(stream: BinaryIO) -> int:
    count = _number(stream, "<Q")
    if count > _MOST:
        raise _Damaged(f"a count of {count:,}")
    return count


def _text(stream: BinaryIO) -> str:
    length = _count(stream)
    raw = stream.read(length)
    if len(raw) != length:
        raise _Damaged("it ends inside of a text")
    return raw.decode("utf-8")


def _value(stream: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _text(stream)
    if kind == _ARRAY and depth < 4:
        inner = _number(stream, "<I")
        return [_value(stream, inner, depth + 1) for _ in range(_count(stream))]
    if kind not in _SCALARS:
        raise _Damaged(f"a value of unknown kind {kind}")
    return _number(stream, _SCALARS[kind])
