"""One view of weights on disk: a safetensors file, an index with its shards, a folder of either, or a GGUF file."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import T3Error
from .gguf import PLAIN_TYPES, is_gguf, read_gguf_header
from .header import Header, TensorInfo, read_header
from .scales import companion_of, is_companion, unscale

if TYPE_CHECKING:
    import torch

INDEX_SUFFIX = ".safetensors.index.json"
# How `struct` reads one number of a format; bfloat16 is the upper half of a float32.
_NUMBERS = {
    **{"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"},
    **{"I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B"},
}
FOLDER_NAMES = ("diffusion_pytorch_model", "model", "adapter_model", "pytorch_lora_weights")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")


class WeightFile:
    """Names, shapes and tensors of one set of weights. Opening reads headers only; `read` maps one tensor.

    Attributes:
        path: what the user named (a file, an index or a folder).
        metadata: the safetensors metadata of all shards, merged.
        nbytes: bytes of tensor data, all shards.
        container: "safetensors" or "gguf".
    """

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self.shards = shards
        self.metadata: dict[str, str] = {}
        self._where: dict[str, Path] = {}
        self._info: dict[str, TensorInfo] = {}
        self._handles: dict[Path, Any] = {}
        self.container = "safetensors"
        for shard in shards:
            header = _header(shard)
            self.container = header.container
            for key, info in header.tensors.items():
                if key in self._where:
                    raise T3Error(f"{path}: {key!r} is in both {self._where[key].name} and {shard.name}. Remove one.")
                self._where[key] = shard
                self._info[key] = info
            self.metadata.update(header.metadata)
        if not self._info:
            raise T3Error(f"{path} holds no tensors.")
        self.nbytes = sum(info.nbytes for info in self._info.values())

    def keys(self) -> list[str]:
        """Every tensor name, in file order, scale companions included."""
        return list(self._info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def companions(self) -> list[str]:
        """Names that only describe another tensor's number format; `read` has already used them."""
        return [key for key in self._info if is_companion(key, self)]

    def __contains__(self, key: object) -> bool:
        return key in self._info

    def __len__(self) -> int:
        return len(self._info)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError for an unknown name."""
        return self._info[key].shape

    def dtype(self, key: str) -> str:
        """The safetensors name of a tensor's data type on disk ("BF16", "F8_E4M3", ...)."""
        return self._info[key].dtype

    def info(self, key: str) -> TensorInfo:
        """Type, shape and size of one tensor. Raises KeyError for an unknown name."""
        return self._info[key]

    @property
    def folder(self) -> Path:
        """Where the weights lie, and what belongs to them beside."""
        return self.path if self.path.is_dir() else self.path.parent

    def sibling_config(self) -> dict[str, Any]:
        """The diffusers or transformers `config.json` beside the weights, or an empty dict when there is none.

        Raises T3Error when it is there and cannot be read.
        """
        return self.sibling("config.json")

    def sibling(self, name: str) -> dict[str, Any]:
        """A JSON file beside the weights (`adapter_config.json`), or an empty dict when there is none.

        Raises T3Error when it is there and is no JSON object that can be read.
        """
        return _json_if_there(self.folder / name)

    def read_raw(self, key: str) -> torch.Tensor:
        """One tensor exactly as stored, on the CPU, mapped from the file (copy-on-write)."""
        shard = self._where[key]
        if self.container == "gguf":
            return self._read_gguf(key)
        if shard not in self._handles:
            from safetensors import SafetensorError, safe_open

            try:
                self._handles[shard] = safe_open(str(shard), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise T3Error(f"Cannot read {shard}: {error}.") from error
        return self._handles[shard].get_tensor(key)

    def _read_gguf(self, key: str) -> torch.Tensor:
        import torch

        info = self._info[key]
        if info.dtype not in PLAIN_TYPES:
            raise T3Error(
                f"{self.path}: {key!r} is quantised as {info.dtype}, which is not read here. "
                "Use the bf16, fp16 or scaled-fp8 version of these weights, or load the GGUF file in ComfyUI."
            )
        names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        raw = torch.frombuffer(bytearray(b"".join(self.pieces(key))), dtype=torch.uint8)
        return raw.view(names[info.dtype]).reshape(info.shape)

    def pieces(self, key: str, size: int = 16 * 2**20) -> Iterator[bytes]:
        """The bytes of one tensor as they lie in the file, `size` at a time. Needs no tensor library."""
        left = self._info[key].nbytes
        with self._where[key].open("rb") as stream:
            stream.seek(self._info[key].begin)
            while left:
                piece = _read_some(stream, min(left, size), self._where[key])
                left -= len(piece)
                yield piece

    def number(self, key: str) -> float:
        """The number that a tensor of one element holds. Needs no tensor library.

        Raises T3Error when it holds another count of numbers, or is stored in a format that scales have no use for.
        """
        info = self._info[key]
        if math.prod(info.shape) != 1:
            raise T3Error(f"{self.path}: {key!r} has shape {list(info.shape)}; it has to be one number.")
        if info.dtype not in _NUMBERS:
            raise T3Error(
                f"{self.path}: {key!r} is stored as {info.dtype}; one number is read as {', '.join(_NUMBERS)}."
            )
        raw = b"".join(self.pieces(key))
        return float(struct.unpack(_NUMBERS[info.dtype], bytes(2) + raw if info.dtype == "BF16" else raw)[0])

    def read(self, key: str) -> torch.Tensor:
        """One tensor on the CPU; a scaled fp8 weight comes back as float32 `weight * scale`.

        Raises:
            KeyError: no such tensor.
            T3Error: the tensor is quantised in a format that is not read here.
        """
        tensor = self.read_raw(key)
        scale = companion_of(key, self)
        return tensor if scale is None else unscale(self, key, tensor, scale)

    def close(self) -> None:
        """Forget the open handles. Tensors already read stay valid."""
        self._handles.clear()


def _header(path: Path) -> Header:
    return read_gguf_header(path) if is_gguf(path) else read_header(path)


def _read_some(stream: BinaryIO, size: int, path: Path) -> bytes:
    piece = stream.read(size)
    if not piece:
        raise T3Error(f"{path} became shorter while it was read. Run again once it is complete.")
    return piece


def _json_if_there(path: Path) -> dict[str, Any]:
    try:
        # Editors on Windows put a mark before UTF-8, which is no JSON.
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise T3Error(f"{path} cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise T3Error(f"{path} cannot be read: it holds no JSON object, but {json.dumps(found)[:40]}.")
    return found


def _shards_of_index(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise T3Error(f"{index} is not a safetensors index: it has no readable `weight_map`.") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise T3Error(f"{index} names shards outside of its own folder ({outside[0]!r}). Refused.")
    _require_all(index, [index.parent / name for name in names])
    shards = [index.parent / name for name in names]
    present = {key for shard in shards for key in read_header(shard).tensors}
    absent = [key for key in weight_map if key not in present]
    if absent:
        raise T3Error(
            f"{index} promises {len(absent)} tensors its shards do not hold, first {absent[0]!r}. Download them again."
        )
    return shards


def _require_all(what: Path, shards: list[Path]) -> None:
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise T3Error(f"{what}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}.")


def _shards_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*" + INDEX_SUFFIX))
    if len(indexes) == 1:
        return _shards_of_index(indexes[0])
    if indexes:
        names = ", ".join(index.name for index in indexes)
        raise T3Error(f"{folder} holds {len(indexes)} indexes ({names}). Name the one you mean.")
    for name in FOLDER_NAMES:
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    numbered = {(m["stem"], int(m["count"])) for file in files if (m := _SHARD.match(file.name))}
    if len(numbered) == 1:
        stem, count = numbered.pop()
        shards = [folder / f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        _require_all(folder, shards)
        return shards
    if len(files) == 1:
        return files
    if files:
        listed = ", ".join(file.name for file in files[:4])
        raise T3Error(f"{folder} holds {len(files)} safetensors files ({listed}, ...). Name the one you mean.")
    raise T3Error(f"{folder} holds no .safetensors file. Give the file or the folder that does.")


def open_weights(path: str | Path) -> WeightFile:
    """Open a .safetensors file, a `*.safetensors.index.json`, a folder that holds one set of weights, or a .gguf file.

    Only headers are read. Raises T3Error when the path is missing, ambiguous, damaged, or of another format.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise T3Error(f"{place} does not exist. Give a .safetensors file or a folder that holds one.")
    if place.is_dir():
        return WeightFile(place, _shards_of_folder(place))
    if place.name.endswith(INDEX_SUFFIX):
        return WeightFile(place, _shards_of_index(place))
    if place.suffix.lower() == ".safetensors" and (match := _SHARD.match(place.name)):
        # One shard alone would load as a broken model; the user means the whole set.
        stem, count = match["stem"], int(match["count"])
        shards = [place.with_name(f"{stem}-{n:05d}-of-{count:05d}.safetensors") for n in range(1, count + 1)]
        _require_all(place, shards)
        return WeightFile(place, shards)
    return WeightFile(place, [place])
