"""Read the key of one adapter tensor: which parameter it changes, and what part it plays.

Dialects differ in the prefix (ComfyUI, diffusers, PEFT, DiffSynth, kohya), in the naming under it (original or
diffusers) and in the suffix. Facts: ComfyUI 0.30 `comfy/lora.py` and `comfy/weight_adapter`, diffusers 0.42
`lora_conversion_utils`, PEFT's saved state dicts, musubi-tuner.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from . import layout_dit
from .layout_control import CONTROL_MODULES
from .layout_dit import BLOCK_PARAMS, TOP_PARAMS, VACE_PARAMS

DOTTED_PREFIXES = {
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "base_model.model.": "peft",
    "pipe.dit.": "diffsynth",
    "transformer.": "diffusers",
}
UNDERSCORED_PREFIXES = {"lora_unet_": "kohya", "lora_transformer_": "onetrainer", "lycoris_": "lycoris"}
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "conditioner.", "cond_stage_model.", "lora_prior_te")

_INFIX = r"(?:\.(?P<adapter>[A-Za-z0-9_\-]+))?"
_LOKR = ("w1", "w2", "t2", "w1_a", "w1_b", "w2_a", "w2_b")
_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
ROLES = (
    ("down", re.compile(rf"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_INFIX}\.weight$|\.lora_A$")),
    ("up", re.compile(rf"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_INFIX}\.weight$|\.lora_B$")),
    ("up_bias", re.compile(rf"\.(?:lora_B|lora_up){_INFIX}\.bias$")),
    ("mid", re.compile(r"\.lora_mid\.weight$")),
    # DoRA's length of each row (or column), of LyCORIS and of PEFT.
    ("magnitude", re.compile(rf"\.(?:dora_scale|lora_magnitude_vector{_INFIX}(?:\.weight)?)$")),
    *((f"lokr_{part}", re.compile(rf"\.lokr_{part}{_INFIX}$")) for part in _LOKR),
    *((f"hada_{part}", re.compile(rf"\.hada_{part}{_INFIX}$")) for part in _LOHA),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.(?:diff|w_norm)$")),
    ("diff_b", re.compile(r"\.(?:diff_b|b_norm)$")),
    ("diff_m", re.compile(r"\.diff_m$")),  # of a modulation table, whose name is left out
    ("set", re.compile(r"\.set_weight$")),
)
# Algorithms that are recognised so that they can be refused by name.
OTHER_ALGORITHMS = (
    (re.compile(r"\.lokr_\w+(\.|$)"), "LoKr of an unknown kind"),
    (re.compile(r"\.hada_\w+(\.|$)"), "LoHa of an unknown kind"),
    (re.compile(r"\.(oft_\w+|boft_\w+|oft_R\..+)(\.|$)"), "OFT"),
    (re.compile(r"\.ia3_\w+(\.|$)"), "IA3"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_mid(\.|$)"), "LoRA with a core (lora_mid) of an unknown kind"),
    (re.compile(r"\.reshape_weight$"), "reshape_weight, which gives a model's parameters other shapes"),
)


def _underscored(params: dict[str, str], pick: int) -> dict[str, str]:
    """Underscored module name -> original parameter stem; `pick` 0 for original names, 1 for diffusers names."""
    return {_stem(pair[pick]).replace(".", "_"): _stem(pair[0]) for pair in params.items()}


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


_TOP = {**TOP_PARAMS, **{f"{module}.weight": f"{module}.weight" for module in CONTROL_MODULES}}
_UNDERSCORED = {
    naming: {
        "blocks": _underscored(BLOCK_PARAMS, pick),
        "vace_blocks": _underscored({**BLOCK_PARAMS, **VACE_PARAMS}, pick),
        "": _underscored(_TOP, pick),
    }
    for pick, naming in enumerate(("original", "diffusers"))
}
_UNDERSCORED_BLOCK = re.compile(r"(blocks|vace_blocks)_(\d+)_(.+)$")
_UNDERSCORED_RESIDUAL = re.compile(r"control_adapter_residual_blocks_(\d+)_(conv[12])$")


class Place(NamedTuple):
    """A key's target parameter (canonical) under one naming."""

    naming: str
    target: str


@dataclass(frozen=True)
class AdapterKey:
    """One parsed key: its prefix's dialect (None without a prefix), its role, PEFT's adapter name, its places."""

    dialect: str | None
    role: str
    adapter: str | None
    places: tuple[Place, ...]


def is_adapter_key(key: str) -> bool:
    """Whether a key belongs to a LoRA, a diff or another adapter rather than to a full checkpoint."""
    return any(pattern.search(key) for _, pattern in ROLES) or algorithm_of(key) is not None


def algorithm_of(key: str) -> str | None:
    """The name of an adapter algorithm that is not applied here, if the key belongs to one."""
    return next((name for pattern, name in OTHER_ALGORITHMS if pattern.search(key)), None)


def _targets(stem: str, leaf: str) -> tuple[Place, ...]:
    """Parameters `stem` may mean: a module (then its `leaf`), or a parameter that has no module of its own."""
    places = []
    for candidate in (f"{stem}.{leaf}", stem):
        if leaf != "weight" and candidate == stem:
            break  # a change of a bias or a table always names what holds it
        if layout_dit.to_diffusers(candidate):
            places.append(Place("original", candidate))
        if back := layout_dit.to_original(candidate):
            places.append(Place("diffusers", back))
    return tuple(places)


def _underscored_targets(stem: str, leaf: str) -> tuple[Place, ...]:
    if match := _UNDERSCORED_RESIDUAL.match(stem):
        return _targets(f"control_adapter.residual_blocks.{int(match[1])}.{match[2]}", leaf)
    places = []
    match = _UNDERSCORED_BLOCK.match(stem)
    for naming, tables in _UNDERSCORED.items():
        name = tables[match[1]].get(match[3]) if match else tables[""].get(stem)
        if name is None:
            continue
        full = f"{match[1]}.{int(match[2])}.{name}" if match else name
        target = f"{full}.{leaf}" if layout_dit.to_diffusers(f"{full}.{leaf}") else full
        if layout_dit.to_diffusers(target) and not (leaf != "weight" and target == full):
            places.append(Place(naming, target))
    return tuple(places)


def parse_key(key: str) -> AdapterKey | None:
    """Read one adapter key, or None when it is no key of an adapter that is read here.

    `places` is empty when the key has an adapter's suffix but names no parameter of a Wan DiT.
    """
    for role, pattern in ROLES:
        match = pattern.search(key)
        if match is None:
            continue
        stem = key[: match.start()]
        adapter = match.groupdict().get("adapter")
        leaf = {"up_bias": "bias", "diff_b": "bias", "diff_m": "modulation"}.get(role, "weight")
        role = "diff" if role == "diff_m" else role
        for prefix, dialect in UNDERSCORED_PREFIXES.items():
            if stem.startswith(prefix):
                name = stem.removeprefix(prefix).lstrip("_")  # VideoX-Fun writes `lora_unet__blocks_0_...`
                return AdapterKey(dialect, role, adapter, _underscored_targets(name, leaf))
        dialects = []
        stripped = True
        while stripped:
            stripped = False
            for prefix, dialect in DOTTED_PREFIXES.items():
                if stem.startswith(prefix):
                    stem, stripped = stem.removeprefix(prefix), True
                    dialects.append(dialect)
        # PEFT's layers keep the adapter's name in their keys; its own files have a prefix instead.
        spoken = dialects[0] if dialects else "peft" if adapter else None
        return AdapterKey(spoken, role, adapter, _targets(stem, leaf))
    return None


def refusal(key: str) -> str:
    """Why a key of an adapter file cannot be placed, in a few words."""
    if key.startswith(TEXT_ENCODER_PREFIXES):
        return "for the text encoder, which is not changed here"
    if parse_key(key) is None and (algorithm := algorithm_of(key)):
        return f"{algorithm}, which is not applied here"
    if not is_adapter_key(key):
        return "full tensors inside of an adapter file"
    return "names that are no parameter of a Wan transformer"
