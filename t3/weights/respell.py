"""Bring a file's tensors under the names of another dialect, without loading them.

Values stay as they are, bit for bit. The exceptions follow from what a dialect has no name for: an alpha is folded
into the tensors where there is no place for it, and a LoRA's bias becomes a `diff_b`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import T3Error
from .adapter_file import AdapterFile, Piece, scale_of
from .dialects import DIT, TEXT
from .files import WeightFile
from .header import ITEM_BITS
from .identity import Identity
from .peft_settings import SETTINGS_KEY
from .scales import is_companion, rename_layers
from .spelling import Dialect, full_names
from .tokenizer import EMBEDDED, embeddable
from .write import TORCH_TYPES, Entry, tensor_bytes

# The role that takes a scale which has no tensor of its own.
_SCALED = {"lora": ("up",), "loha": ("w1_a",), "lokr": ("w1", "w1_a"), "bias": ("diff",)}
# What other readers of a dialect have no names for.
_UNREAD = {
    **dict.fromkeys(("diffusers", "peft", "diffsynth"), ".diff and .diff_b"),
    "kohya": "tables that belong to no layer",
}


@dataclass
class Respelled:
    """A file's content in another dialect.

    Attributes:
        entries: what to write, tensor data unread.
        metadata: of the old file, without what no longer holds.
        dropped: keys that have no place in the new file.
        notes: what a user should know.
    """

    entries: list[Entry]
    metadata: dict[str, str]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def respell(file: WeightFile, found: Identity, dialect: Dialect) -> Respelled:
    """The content of a file, as `identify` found it, in `dialect`.

    Raises T3Error for a file that cannot be used, is GGUF, or that the dialect has no names for.
    """
    if found.problem:
        raise T3Error(found.problem)
    if file.container != "safetensors":
        raise T3Error(f"{file.path} is a {file.container.upper()} file; only safetensors are converted.")
    if found.adapter:
        return _respell_adapter(file, found.adapter, dialect)
    return _respell_full(file, found, dialect)


def _respell_full(file: WeightFile, found: Identity, dialect: Dialect) -> Respelled:
    assert found.config is not None
    names = full_names(found.component, found.config, dialect)
    renamed = {found.names[canonical]: name for canonical, name in names.items()}
    prefix = dialect.full_prefix or "" if found.component == DIT else ""
    same_names = all(old == new for old, new in renamed.items())
    out = Respelled([], {})
    for key in file:
        new = renamed.get(key) or (key if same_names else _companion(file, key, renamed, found.prefix, prefix))
        if new is None:
            out.dropped.append(key)
        else:
            out.entries.append(_as_it_is(file, key, new))
    layers = {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in renamed.items()}
    out.metadata = rename_layers(file, lambda stem: layers.get(stem, stem if same_names else None))
    if found.component == TEXT and dialect.name == "comfyui":
        _embed_tokenizer(file, found.config["vocab_size"], out)
    return out


def _embed_tokenizer(file: WeightFile, vocabulary: int, out: Respelled) -> None:
    """ComfyUI takes the tokenizer from inside of a text encoder's file, under this name, and opens none without it."""
    if any(entry.name == EMBEDDED for entry in out.entries):
        return
    if inside := next((key for key in out.dropped if key.rpartition(".")[2] == EMBEDDED), None):
        out.dropped.remove(inside)
        out.entries.append(_as_it_is(file, inside, EMBEDDED))
    elif beside := embeddable(file, vocabulary):
        path, data = beside
        out.entries.append(Entry(EMBEDDED, "U8", (len(data),), lambda: [data]))
        out.notes.append(f"{path} is inside as `{EMBEDDED}`, from which ComfyUI takes the tokenizer")
    else:
        out.notes.append(
            f"WARNING: ComfyUI cannot use this file: it takes the tokenizer from `{EMBEDDED}` inside, and none was "
            "found. Put umT5's spiece.model (of google/umt5-xxl; Wan's models in diffusers' layout have it in the "
            f"folder tokenizer) beside {file.path} and convert again"
        )


def _companion(file: WeightFile, key: str, renamed: dict[str, str], old_prefix: str, prefix: str) -> str | None:
    """The new name of a tensor that says how others of this component are stored; None for any other tensor."""
    if not is_companion(key, file):
        return None
    stem, _, last = key.rpartition(".")
    if last == "scaled_fp8":
        # Each component of a bundle has its own, under its prefix.
        return prefix + last if key == old_prefix + last else None
    weight = renamed.get(f"{stem}.weight")
    return weight and f"{weight.removesuffix('.weight')}.{last}"


def _respell_adapter(file: WeightFile, adapter: AdapterFile, dialect: Dialect) -> Respelled:
    metadata = {key: value for key, value in file.metadata.items() if key != SETTINGS_KEY}
    out = Respelled([], metadata)
    rounded = 0
    for piece in adapter.pieces:
        entries, changed = _piece_entries(file, piece, dialect)
        out.entries += entries
        rounded += changed
    if rounded:
        out.notes.append(
            f"{dialect.name} has no alpha: {rounded} scales are folded into the tensors they multiply, in float32 "
            "where they are no power of two"
        )
    out.notes += unread_notes([(piece.target, piece.kind) for piece in adapter.pieces], dialect)
    return out


def unread_notes(changes: Sequence[tuple[str, str]], dialect: Dialect) -> list[str]:
    """What to say of changes, each a parameter and a kind, that other readers of a dialect have no names for."""
    if dialect.underscored:
        unread = sum(not target.endswith((".weight", ".bias")) for target, _ in changes)
    else:
        unread = sum(kind == "diff" for _, kind in changes) if dialect.name in _UNREAD else 0
    if not unread:
        return []
    return [
        f"{unread} changes have names that {dialect.name} itself lacks ({_UNREAD[dialect.name]}): T3 reads them, "
        "other programs may not"
    ]


def _piece_entries(file: WeightFile, piece: Piece, dialect: Dialect) -> tuple[list[Entry], bool]:
    """One piece's tensors in a dialect, and whether a scale was folded into one of them."""
    is_bias = piece.target.endswith(".bias")
    module = dialect.module(piece.target.removesuffix(".bias").removesuffix(".weight"))
    keep_bias = piece.kind == "bias" and dialect.up_bias
    scale = scale_of(file, piece)
    # A LoKr of two whole factors has no rank, so readers ignore its alpha.
    with_alpha = dialect.alpha and piece.rank > 0 and piece.kind != "bias"
    entries = []
    folded = False
    for role, key in piece.keys.items():
        if role == "magnitude":
            entries.append(_magnitude(file, piece, key, module, dialect))
            continue
        name = f"{module}.{_ending(piece, role, is_bias, keep_bias, dialect)}"
        if not with_alpha and scale != 1 and role in _SCALED.get(piece.kind, ()):
            entries.append(_scaled(file, key, name, scale))
            folded = True
        else:
            entries.append(_as_it_is(file, key, name))
    if with_alpha:
        if piece.alpha:
            entries.append(_as_it_is(file, piece.alpha, f"{module}.alpha"))
        elif scale != 1 or dialect.underscored:  # kohya's tools want one always
            value = struct.pack("<f", scale * piece.rank)
            entries.append(Entry(f"{module}.alpha", "F32", (), lambda: [value]))
    return entries, folded and piece.kind != "bias"


def _ending(piece: Piece, role: str, is_bias: bool, keep_bias: bool, dialect: Dialect) -> str:
    if piece.kind == "lora":
        return {"down": dialect.down, "up": dialect.up, "mid": "lora_mid.weight"}[role]
    if piece.kind in ("loha", "lokr"):
        return f"{'hada' if piece.kind == 'loha' else 'lokr'}_{role}"
    if keep_bias:
        return dialect.up.removesuffix("weight") + "bias"
    return "set_weight" if piece.kind == "set" else "diff_b" if is_bias else "diff"


def _magnitude(file: WeightFile, piece: Piece, key: str, module: str, dialect: Dialect) -> Entry:
    """DoRA's lengths: PEFT has one number for each row; LyCORIS the shape that multiplies the weight."""
    shape = file.shape(key)
    by_rows = len(shape) == 1 or shape[0] != 1
    if by_rows and dialect.name in ("peft", "diffusers", "diffsynth"):
        return _as_it_is(file, key, f"{module}.lora_magnitude_vector", (math.prod(shape),))
    if len(shape) == 1:
        axes = max(2, max(len(file.shape(other)) for other in piece.keys.values()))
        shape = (shape[0], *[1] * (axes - 1))
    return _as_it_is(file, key, f"{module}.dora_scale", shape)


def as_it_is(file: WeightFile) -> list[Entry]:
    """The content of a file under the names it has."""
    return [_as_it_is(file, key, key) for key in file]


def _as_it_is(file: WeightFile, key: str, name: str, shape: tuple[int, ...] | None = None) -> Entry:
    return Entry(name, file.dtype(key), file.shape(key) if shape is None else shape, lambda: file.pieces(key))


def _scaled(file: WeightFile, key: str, name: str, scale: float) -> Entry:
    """A tensor times a number, rounded to nothing coarser than float32."""
    exact = abs(math.frexp(scale)[0]) == 0.5  # a power of two only moves the exponent
    stored = file.dtype(key)
    dtype = stored if stored == "F64" or (exact and stored in TORCH_TYPES and ITEM_BITS[stored] >= 16) else "F32"

    def pieces() -> Iterable[bytes]:
        import torch

        wide: Any = torch.float64 if dtype == "F64" else torch.float32
        return [tensor_bytes((file.read(key).to(wide) * scale).to(getattr(torch, TORCH_TYPES[dtype])))]

    return Entry(name, dtype, file.shape(key), pieces)
