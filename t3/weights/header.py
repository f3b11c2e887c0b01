"""Read and check the header of a safetensors file without any tensor library.

The header alone answers `inspect` and `--dry-run`, so it is parsed here in plain Python: eight bytes of length,
then JSON. Every damage a download can do is named before anything trusts an offset.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import T3Error

MAX_HEADER_BYTES = 100 * 1000 * 1000  # the limit of the safetensors library itself
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int = 0  # byte of the file where its data starts


@dataclass(frozen=True)
class Header:
    """All tensors of one file, and its free-text metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    container: str = "safetensors"


class _DuplicateKey(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    """Name the files people give by mistake: web pages, pickles, archives, Git LFS pointers."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return  # safetensors; the first bytes are a length, which may look like any of the marks below
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise T3Error(
            f"{path} is a web page, not weights: the download saved the site's page instead. Download it again."
        )
    if start.startswith(b"version https://git-lfs"):
        raise T3Error(f"{path} is a Git LFS pointer, not the weights. Fetch the file itself with `git lfs pull`.")
    pickled = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"
    if pickled or start.startswith(b"PK\x03\x04") or path.suffix.lower() in PICKLE_SUFFIXES:
        raise T3Error(
            f"{path} is a PyTorch pickle. Pickles can run code when opened, so they are never loaded: "
            "convert it to safetensors, or download the safetensors version."
        )
    if size >= 10 and b"\0" not in start:  # the length of a header has zeros among its eight bytes
        raise T3Error(f"{path} is no safetensors file: it begins like a text, {start[:16]!r}. Name the weights.")


def _check_tensor(path: Path, key: str, entry: Any, data_start: int, data_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in [*shape, begin, end])
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise T3Error(f"{path} is damaged: the header entry of {key!r} is not a safetensors entry. Download it again.")
    if dtype not in ITEM_BITS:
        raise T3Error(f"{path}: {key!r} has the unknown data type {dtype!r}; known are {', '.join(ITEM_BITS)}.")
    if end > data_bytes:
        raise T3Error(
            f"{path} is truncated: {key!r} ends at byte {end:,} of the data, but the file holds only {data_bytes:,}. "
            "Download it again."
        )
    size = math.prod(shape) * ITEM_BITS[dtype] // 8
    if end - begin != size:
        raise T3Error(
            f"{path} is damaged: {key!r} {dtype} {list(shape)} needs {size:,} bytes, but its "
            f"offsets span {end - begin:,}."
        )
    return TensorInfo(dtype, tuple(shape), size, data_start + begin)


def read_header(path: Path) -> Header:
    """Parse and check the header of one safetensors file.

    Raises:
        T3Error: the file is missing, of another format, truncated or damaged; the message says which.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(512)
            _refuse_other_formats(path, start, size)
            if size < 10:
                raise T3Error(f"{path} is too short ({size} bytes) to be a safetensors file. Download it again.")
            (length,) = struct.unpack("<Q", start[:8])
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise T3Error(
                    f"{path} is not a whole safetensors file: it claims a header of {length:,} bytes, but "
                    + (
                        f"the file has {size:,}. Download it again."
                        if length > size - 8
                        else f"the limit is {MAX_HEADER_BYTES:,}."
                    )
                )
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise T3Error(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise T3Error(f"{path} is damaged: its header names {error.args[0]!r} twice.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise T3Error(f"{path} is not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise T3Error(f"{path} is not a safetensors file: its header is not a JSON object.")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise T3Error(f"{path} is damaged: its metadata is not a table of texts.")
    start_of_data = 8 + length
    tensors = {
        key: _check_tensor(path, key, entry, start_of_data, size - start_of_data) for key, entry in entries.items()
    }
    _check_whole(path, tensors, start_of_data, size)
    return Header(tensors, metadata)


def _check_whole(path: Path, tensors: dict[str, TensorInfo], at: int, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor, as the format asks."""
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != at:
            what = "overlaps the tensor before it" if info.begin < at else f"leaves {info.begin - at:,} bytes unused"
            raise T3Error(f"{path} is damaged: the data of {key!r} {what}. Download it again.")
        at += info.nbytes
    if at != size:
        raise T3Error(f"{path} is damaged: {size - at:,} bytes follow the last tensor. Download it again.")
