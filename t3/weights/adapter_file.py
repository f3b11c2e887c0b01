"""Sort an adapter file (LoRA, diff, or both mixed) into pieces, each one change to one parameter."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import T3Error
from .adapter_keys import AdapterKey, is_adapter_key, parse_key, refusal
from .header import FLOAT_TYPES
from .layout_dit import block_index

if TYPE_CHECKING:
    from .files import WeightFile


@dataclass
class Piece:
    """One change to one parameter.

    Attributes:
        target: canonical parameter name.
        kind: "lora" (`up @ down`), "bias" (the bias of `up`) or "diff" (added as it is).
        keys: role -> key in the file.
        rank: of the LoRA this piece belongs to; 0 for diffs.
        alpha: key of the LoRA's alpha, or None.
        scale: what multiplies a LoRA that has no alpha tensor.
    """

    target: str
    kind: str
    keys: dict[str, str]
    rank: int = 0
    alpha: str | None = None
    scale: float = 1.0


@dataclass
class AdapterFile:
    """An adapter file's pieces, and every key that is not in one."""

    dialect: str
    naming: str
    form: str
    pieces: list[Piece] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # key -> why
    notes: list[str] = field(default_factory=list)

    @property
    def matched(self) -> list[str]:
        """The keys that the pieces are made of."""
        alphas = {piece.alpha for piece in self.pieces if piece.alpha}
        return sorted(alphas | {key for piece in self.pieces for key in piece.keys.values()})

    @property
    def layers(self) -> int:
        """One more than the highest block that is changed; 0 when no block is."""
        return 1 + max((index for p in self.pieces if (index := block_index(p.target)) is not None), default=-1)


def is_adapter(file: WeightFile) -> bool:
    """Whether any key of the file belongs to an adapter."""
    return any(is_adapter_key(key) for key in file)


def _naming(parsed: dict[str, AdapterKey]) -> str:
    """The naming most keys read in. One file is read in one naming: `norm2` means different layers in the two."""
    votes = Counter(place.naming for key in parsed.values() for place in key.places)
    return "diffusers" if votes["diffusers"] > votes["original"] else "original"


def _group(file: WeightFile, sorted_file: AdapterFile, parsed: dict[str, AdapterKey]) -> dict[str, dict[str, str]]:
    """Canonical module or parameter -> role -> key."""
    groups: dict[str, dict[str, str]] = {}
    for key, adapter_key in parsed.items():
        place = next((place for place in adapter_key.places if place.naming == sorted_file.naming), None)
        if place is None:
            sorted_file.refused[key] = (
                "in another naming than the rest of the file" if adapter_key.places else refusal(key)
            )
            continue
        roles = groups.setdefault(place.target.removesuffix(".weight").removesuffix(".bias"), {})
        role = "diff_b" if adapter_key.role == "diff" and place.target.endswith(".bias") else adapter_key.role
        if role in roles:
            sorted_file.refused[key] = f"second tensors for what {roles[role]!r} already changes"
            continue
        roles[role] = key
    return groups


def _pieces(file: WeightFile, module: str, roles: dict[str, str], settings: dict[str, Any], weight: str) -> list[Piece]:
    pieces = []
    if "down" in roles and "up" in roles:
        shape = file.shape(roles["down"])
        if not shape or shape[0] == 0:
            raise T3Error(f"{file.path}: {roles['down']!r} has shape {list(shape)}, so no rank.")
        told = (shape[0], roles.get("alpha"), _outside_scale(roles["down"], shape[0], settings))
        pieces.append(Piece(weight, "lora", {"down": roles["down"], "up": roles["up"]}, *told))
        if "up_bias" in roles:
            pieces.append(Piece(f"{module}.bias", "bias", {"diff": roles["up_bias"]}, *told))
    if "diff" in roles:
        pieces.append(Piece(weight, "diff", {"diff": roles["diff"]}))
    if "diff_b" in roles:
        pieces.append(Piece(f"{module}.bias", "diff", {"diff": roles["diff_b"]}))
    return pieces


def _peft_settings(file: WeightFile, dialect: str) -> dict[str, Any]:
    """PEFT keeps alpha outside of the tensors: in `adapter_config.json`, or in metadata that diffusers writes."""
    packed = file.metadata.get("lora_adapter_metadata")
    if packed:
        try:
            found = json.loads(packed)
            return {key.removeprefix("transformer."): value for key, value in found.items()}
        except (ValueError, AttributeError) as error:
            raise T3Error(
                f"{file.path}: its `lora_adapter_metadata` cannot be read, so its scale is unknown."
            ) from error
    return file.sibling("adapter_config.json") if "peft" in dialect else {}


def _outside_scale(down: str, rank: int, settings: dict[str, Any]) -> float:
    """The scale PEFT's settings give a LoRA; 1 where there are none."""
    alpha = settings.get("lora_alpha")
    if alpha is None:
        return 1.0
    stem = re.split(r"\.lora_", down)[0]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", stem):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def scale_of(file: WeightFile, piece: Piece) -> float:
    """What the file itself multiplies a piece by: alpha / rank. Reads the alpha.

    Raises T3Error when the alpha is no finite number.
    """
    if piece.alpha is None:
        return piece.scale
    if math.prod(file.shape(piece.alpha)) != 1:
        raise T3Error(
            f"{file.path}: {piece.alpha!r} has shape {list(file.shape(piece.alpha))}; an alpha is one number."
        )
    value = float(file.read_raw(piece.alpha).float().item())
    if not math.isfinite(value):
        raise T3Error(f"{file.path}: {piece.alpha!r} is {value}; an alpha is a finite number.")
    return value / piece.rank


def read_adapter(file: WeightFile) -> AdapterFile:
    """Sort all keys of an adapter file, from its header alone.

    Raises:
        T3Error: an A without its B (or the other way round), or PEFT settings that cannot be honoured.
    """
    parsed: dict[str, AdapterKey] = {}
    refused: dict[str, str] = {}
    for key in file:
        adapter_key = parse_key(key) if not key.startswith(("lora_te", "lora_prior_te")) else None
        if adapter_key is None:
            refused[key] = refusal(key)
        elif adapter_key.role != "alpha" and file.dtype(key) not in FLOAT_TYPES:
            refused[key] = f"stored as {file.dtype(key)}, not as floating point"
        else:
            parsed[key] = adapter_key
    used = {key.dialect for key in parsed.values() if key.places}
    out = AdapterFile(" + ".join(sorted(used)) or "unknown", _naming(parsed), "", refused=refused)
    groups = _group(file, out, parsed)
    odd = [(roles, module) for module, roles in groups.items() if ("down" in roles) != ("up" in roles)]
    if odd:
        roles, module = odd[0]
        have, lack = ("A (down)", "B (up)") if "down" in roles else ("B (up)", "A (down)")
        raise T3Error(
            f"{file.path} is incomplete: {len(odd)} LoRA modules have {have} but no {lack}, first {module!r}. "
            "Download or export it again."
        )
    settings = _peft_settings(file, out.dialect)
    if settings.get("use_dora"):
        raise T3Error(
            f"{file.path}: its PEFT settings say DoRA, which is not applied here. Merge it first, or use LoRA."
        )
    for module, roles in groups.items():
        bare = next(p for k in roles.values() for p in parsed[k].places if p.naming == out.naming).target
        weight = bare if bare == module else f"{module}.weight"
        out.pieces += _pieces(file, module, roles, settings, weight)
        for role in ("alpha", "up_bias"):
            if role in roles and "down" not in roles:
                out.refused[roles[role]] = "parts of a LoRA whose A and B are missing"
    if "peft" in out.dialect and not settings and any(p.kind == "lora" and p.alpha is None for p in out.pieces):
        out.notes.append("no adapter_config.json beside it: alpha taken to equal the rank")
    kinds = {piece.kind for piece in out.pieces}
    out.form = "lora" if kinds <= {"lora", "bias"} else "diff" if kinds == {"diff"} else "lora+diff"
    return out
