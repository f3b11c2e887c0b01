"""Sort an adapter file (LoRA, LoKr, LoHa, DoRA, diff, or several mixed) into pieces, each one change to one parameter.

Pieces are the canonical form of every adapter: the parameter by its original Wan name, and the tensors that change it
by the roles that `arithmetic` knows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import T3Error
from .adapter_keys import AdapterKey, is_adapter_key, parse_key, refusal
from .arithmetic import ROLES, Shape, missing_roles, rank_of
from .header import FLOAT_TYPES
from .layout_dit import block_index
from .peft_settings import ALL_SETTINGS_BESIDE, Settings, read_settings

if TYPE_CHECKING:
    import torch

    from .files import WeightFile

# A form's roles as the keys of a file name them -> as `arithmetic` does.
_KEY_ROLES = {
    "lora": {role: role for role in ROLES["lora"]},
    "loha": {f"hada_{role}": role for role in ROLES["loha"]},
    "lokr": {f"lokr_{role}": role for role in ROLES["lokr"]},
}
_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


@dataclass
class Piece:
    """One change to one parameter.

    Attributes:
        target: canonical parameter name.
        kind: "lora", "loha", "lokr", "diff", "set" or "bias", as in `arithmetic`.
        keys: role -> key in the file.
        rank: what alpha is divided by; 0 where a change has no rank.
        alpha: key of the alpha, or None.
        scale: what multiplies the change where there is no alpha tensor.
    """

    target: str
    kind: str
    keys: dict[str, str]
    rank: int = 0
    alpha: str | None = None
    scale: float = 1.0

    def shapes(self, file: WeightFile) -> dict[str, Shape]:
        """Role -> shape."""
        return {role: file.shape(key) for role, key in self.keys.items()}

    def read(self, file: WeightFile, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Role -> tensor, in the dtype and on the device of `like`."""
        return {role: file.read(key).to(device=like.device, dtype=like.dtype) for role, key in self.keys.items()}


@dataclass
class AdapterFile:
    """An adapter file's pieces, and every key that is not in one.

    Attributes:
        dialect: "comfyui", "diffusers", "peft", "diffsynth", "kohya", "original", ...; several joined by " + ".
        naming: "original" or "diffusers": what modules are called under the dialect's prefix.
        form: the forms that occur, joined by "+": "lora", "diff", "lora+diff", "lokr", "dora", ...
        refused: key -> why it has no place.
    """

    dialect: str
    naming: str
    form: str
    pieces: list[Piece] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
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


def read_adapter(file: WeightFile) -> AdapterFile:
    """Sort all keys of an adapter file, from its header alone.

    Raises T3Error when PEFT settings beside or inside of the file cannot be honoured.
    """
    parsed: dict[str, AdapterKey] = {}
    refused: dict[str, str] = {}
    for key in file:
        adapter_key = parse_key(key)
        if adapter_key is None or not adapter_key.places:
            refused[key] = refusal(key)
        elif adapter_key.role != "alpha" and file.dtype(key) not in FLOAT_TYPES:
            refused[key] = f"stored as {file.dtype(key)}, not as floating point"
        else:
            parsed[key] = adapter_key
    naming = _naming(parsed)
    used = {key.dialect or naming for key in parsed.values()}
    out = AdapterFile(" + ".join(sorted(used)) or "unknown", naming, "", refused=refused)
    settings = read_settings(file, "peft" in used)
    for module, roles in _group(out, parsed).items():
        bare = next(p for k in roles.values() for p in parsed[k].places if p.naming == naming).target
        _add_pieces(file, out, module, bare if bare == module else f"{module}.weight", roles, settings)
    unscaled = any(p.kind in ROLES and p.alpha is None for p in out.pieces)
    if "peft" in used and not settings.values and unscaled:
        out.notes.append("no adapter_config.json beside it: alpha taken to equal the rank")
    if settings.dora and not any("magnitude" in piece.keys for piece in out.pieces):
        raise T3Error(f"{file.path}: {ALL_SETTINGS_BESIDE} say DoRA, but it holds no magnitudes. Export it again.")
    out.form = _form(out.pieces)
    return out


def _naming(parsed: Mapping[str, AdapterKey]) -> str:
    """The naming most keys read in. One file is read in one naming: `norm2` means different layers in the two."""
    votes = Counter(place.naming for key in parsed.values() for place in key.places)
    return "diffusers" if votes["diffusers"] > votes["original"] else "original"


def _group(out: AdapterFile, parsed: Mapping[str, AdapterKey]) -> dict[str, dict[str, str]]:
    """Canonical module or parameter -> role -> key."""
    groups: dict[str, dict[str, str]] = {}
    for key, adapter_key in parsed.items():
        place = next((place for place in adapter_key.places if place.naming == out.naming), None)
        if place is None:
            out.refused[key] = "in another naming than the rest of the file"
            continue
        roles = groups.setdefault(place.target.removesuffix(".weight").removesuffix(".bias"), {})
        role = "diff_b" if adapter_key.role == "diff" and place.target.endswith(".bias") else adapter_key.role
        if role in roles:
            out.refused[key] = f"second tensors for what {roles[role]!r} already changes"
            continue
        roles[role] = key
    return groups


def _add_pieces(
    file: WeightFile, out: AdapterFile, module: str, weight: str, roles: dict[str, str], settings: Settings
) -> None:
    """Turn one module's keys into pieces; what makes none is refused."""
    left = dict(roles)
    forms = [kind for kind, names in _KEY_ROLES.items() if any(name in roles for name in names)]
    if len(forms) > 1:
        names = " and ".join(_NAMES[kind] for kind in forms)
        for kind in forms:
            out.refused.update({left.pop(name): f"{names} of one module" for name in _KEY_ROLES[kind] if name in left})
    elif forms:
        _add_product(file, out, module, weight, left, forms[0], settings)
    for role, kind, target in (("set", "set", weight), ("diff", "diff", weight), ("diff_b", "diff", f"{module}.bias")):
        if role in left:
            out.pieces.append(Piece(target, kind, {kind: left.pop(role)}))
    out.refused.update(dict.fromkeys(left.values(), "parts of a LoRA whose A and B are missing"))


def _add_product(
    file: WeightFile, out: AdapterFile, module: str, weight: str, left: dict[str, str], kind: str, settings: Settings
) -> None:
    keys = {role: left.pop(name) for name, role in _KEY_ROLES[kind].items() if name in left}
    if lack := missing_roles(kind, set(keys)):
        have = {"up": "B (up)", "down": "A (down)"}
        of = " and ".join(have.get(role, role) for role in keys)
        out.refused.update(dict.fromkeys(keys.values(), f"{_NAMES[kind]} parts {of} with no {lack}"))
        return
    rank = rank_of(kind, {role: file.shape(key) for role, key in keys.items()})
    if rank == 0 and not (kind == "lokr" and {"w1", "w2"} <= set(keys)):
        out.refused.update(dict.fromkeys(keys.values(), "parts of rank 0"))
        return
    if "magnitude" in left:
        keys["magnitude"] = left.pop("magnitude")
    some_key = keys.get("down") or next(iter(keys.values()))
    told = (rank, left.pop("alpha", None), settings.scale(some_key, rank))
    out.pieces.append(Piece(weight, kind, keys, *told))
    if "up_bias" in left:
        out.pieces.append(Piece(f"{module}.bias", "bias", {"diff": left.pop("up_bias")}, *told))


def _form(pieces: list[Piece]) -> str:
    kinds = {"dora" if "magnitude" in piece.keys else piece.kind for piece in pieces} - {"bias"}
    order = ("lora", "dora", "lokr", "loha", "diff", "set")
    return "+".join(kind for kind in order if kind in kinds) or "unknown"


def scale_of(file: WeightFile, piece: Piece) -> float:
    """What the file itself multiplies a piece by: alpha / rank. Reads the alpha, without any tensor library.

    Raises T3Error when the alpha is no finite number.
    """
    if piece.alpha is None:
        return piece.scale
    value = file.number(piece.alpha)
    if not math.isfinite(value):
        raise T3Error(f"{file.path}: {piece.alpha!r} is {value}; an alpha is a finite number, mostly the rank or less.")
    # A LoKr of two whole factors has no rank, and its alpha no meaning (as in LyCORIS and ComfyUI).
    return value / piece.rank if piece.rank else 1.0
