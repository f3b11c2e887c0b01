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
from .layout_dit import BLOCK_PARAMS, TOP_PARAMS

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
ROLES = (
    ("down", re.compile(rf"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_INFIX}\.weight$|\.lora_A$")),
    ("up", re.compile(rf"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_INFIX}\.weight$|\.lora_B$")),
    ("up_bias", re.compile(rf"\.(?:lora_B|lora_up){_INFIX}\.bias$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.(?:diff|w_norm)$")),
    ("diff_b", re.compile(r"\.(?:diff_b|b_norm)$")),
)
# Algorithms that are recognised so that they can be refused by name.
OTHER_ALGORITHMS = (
    (re.compile(r"\.lokr_\w+(\.|$)"), "LoKr"),
    (re.compile(r"\.hada_\w+(\.|$)"), "LoHa"),
    (re.compile(r"\.(dora_scale|lora_magnitude_vector(\..+)?)$"), "DoRA"),
    (re.compile(r"\.(oft_\w+|boft_\w+|oft_R\..+)(\.|$)"), "OFT"),
    (re.compile(r"\.ia3_\w+(\.|$)"), "IA3"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_mid(\.|$)"), "LoRA with a Tucker core (lora_mid)"),
    (re.compile(r"\.(set_weight|reshape_weight)$"), "weight replacement (set_weight)"),
)


def _underscored(params: dict[str, str], pick: int) -> dict[str, str]:
    """Underscored module name -> original parameter stem; `pick` 0 for original names, 1 for diffusers names."""
    table = {}
    for pair in params.items():
        table[pair[pick].removesuffix(".weight").removesuffix(".bias").replace(".", "_")] = (
            pair[0].removesuffix(".weight").removesuffix(".bias")
        )
    return table


_UNDERSCORED_BLOCK = {"original": _underscored(BLOCK_PARAMS, 0), "diffusers": _underscored(BLOCK_PARAMS, 1)}
_UNDERSCORED_TOP = {"original": _underscored(TOP_PARAMS, 0), "diffusers": _underscored(TOP_PARAMS, 1)}


class Place(NamedTuple):
    """A key's target parameter (canonical) under one naming."""

    naming: str
    target: str


@dataclass(frozen=True)
class AdapterKey:
    """One parsed key: its prefix's dialect, its role, PEFT's adapter name, and where it may belong."""

    dialect: str
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
        if leaf == "bias" and candidate == stem:
            break  # a bias change always names the module
        if layout_dit.to_diffusers(candidate):
            places.append(Place("original", candidate))
        if back := layout_dit.to_original(candidate):
            places.append(Place("diffusers", back))
    return tuple(places)


def _underscored_targets(stem: str, leaf: str) -> tuple[Place, ...]:
    places = []
    match = re.match(r"blocks_(\d+)_(.+)$", stem)
    for naming in ("original", "diffusers"):
        name = _UNDERSCORED_BLOCK[naming].get(match[2]) if match else _UNDERSCORED_TOP[naming].get(stem)
        if name is None:
            continue
        full = f"blocks.{int(match[1])}.{name}" if match else name
        target = f"{full}.{leaf}" if layout_dit.to_diffusers(f"{full}.{leaf}") else full
        if layout_dit.to_diffusers(target) and not (leaf == "bias" and target == full):
            places.append(Place(naming, target))
    return tuple(places)


def parse_key(key: str) -> AdapterKey | None:
    """Read one adapter key, or None when it is no LoRA or diff key at all.

    `places` is empty when the key has an adapter's suffix but names no parameter of a Wan DiT.
    """
    for role, pattern in ROLES:
        match = pattern.search(key)
        if match is None:
            continue
        stem = key[: match.start()]
        adapter = match.groupdict().get("adapter")
        leaf = "bias" if role in ("up_bias", "diff_b") else "weight"
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
        return AdapterKey(dialects[0] if dialects else "original", role, adapter, _targets(stem, leaf))
    return None


def refusal(key: str) -> str:
    """Why a key of an adapter file cannot be placed, in a few words."""
    if algorithm := algorithm_of(key):
        return f"{algorithm}, which is not applied here"
    if key.startswith(TEXT_ENCODER_PREFIXES):
        return "for the text encoder, which is not changed here"
    if not is_adapter_key(key):
        return "full tensors inside of an adapter file"
    return "names that are no parameter of a Wan transformer"
