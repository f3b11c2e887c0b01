"""Recognise how a full checkpoint spells its names, and bring them to canonical form.

Canonical names are the original Wan names without any prefix. A dialect is a prefix plus a naming scheme; both are
found from the keys alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import layout_dit, layout_text, layout_vae
from .layout_dit import Layout

if TYPE_CHECKING:
    from .files import WeightFile

DIT, VAE, TEXT = "dit", "vae", "text-encoder"

# One key that every file of this component and naming holds, in order of how telling it is.
MARKERS = (
    ("condition_embedder.time_embedder.linear_1.weight", DIT, "diffusers"),
    ("blocks.0.attn1.to_q.weight", DIT, "diffusers"),
    ("blocks.0.self_attn.q.weight", DIT, "original"),
    ("head.modulation", DIT, "original"),
    ("decoder.mid_block.resnets.0.norm1.gamma", VAE, "diffusers"),
    ("decoder.middle.0.residual.0.gamma", VAE, "original"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", TEXT, "huggingface"),
    ("blocks.0.attn.q.weight", TEXT, "original"),
)
PREFIXES = {
    DIT: (
        *("", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "pipe.transformer."),
        *("base_model.model.", "dit.", "net.", "model.", "model.model.", "module.", "_orig_mod."),
    ),
    VAE: ("", "vae.", "first_stage_model.", "model."),
    TEXT: ("", "text_encoder.", "text_encoders.umt5xxl.transformer.", "umt5xxl.transformer.", "transformer.", "model."),
}
# Prefixes that belong to one dialect; the others say nothing about who wrote a file.
PREFIX_DIALECTS = {
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "pipe.dit.": "diffsynth",
    "base_model.model.": "peft",
}
# In all-in-one checkpoints, next to the component that is being read.
OTHER_COMPONENTS = ("vae.", "first_stage_model.", "text_encoders.", "text_encoder.", "cond_stage_model.")


@dataclass
class Names:
    """The keys of one full checkpoint, sorted into what they are.

    Attributes:
        component: "dit", "vae" or "text-encoder".
        naming: "original", "diffusers" or "huggingface".
        prefix: what stands before every name.
        found: canonical name -> key in the file.
        unused: keys that are known and carry nothing the model needs.
        refused: keys that are no parameter of this component.
    """

    component: str
    naming: str
    prefix: str
    found: dict[str, str]
    unused: list[str]
    refused: list[str]

    @property
    def dialect(self) -> str:
        """Whose way of writing it is: that of the prefix, or the naming itself."""
        return PREFIX_DIALECTS.get(self.prefix, self.naming) if self.component == DIT else self.naming


def _marker(keys: list[str]) -> tuple[str, str, str] | None:
    for marker, component, naming in MARKERS:
        for key in keys:
            if key.endswith(marker) and (prefix := key[: -len(marker)]) in PREFIXES[component]:
                return component, naming, prefix
    return None


def _same(key: str) -> str | None:
    return key


def _vae_renamer(layout: Layout) -> Callable[[str], str | None]:
    back = {param.name: original for original, param in layout.items()}
    return back.get


def _renamer(component: str, naming: str, file: WeightFile, prefix: str) -> Callable[[str], str | None]:
    if component == DIT:
        return layout_dit.to_original if naming == "diffusers" else lambda k: k if layout_dit.to_diffusers(k) else None
    if component == TEXT:
        if naming == "huggingface":
            return layout_text.to_original
        return lambda k: k if layout_text.to_huggingface(k) else None
    if naming == "original":
        return _same  # the VAE's layout, built from the shapes later, decides which names belong
    shapes = {key.removeprefix(prefix): file.shape(key) for key in file}
    try:
        return _vae_renamer(layout_vae.vae_layout(layout_vae.vae_config_from_diffusers(shapes)))
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return lambda key: None


def _known_unused(component: str, naming: str, key: str) -> bool:
    if component == DIT and naming == "diffusers":
        return bool(layout_dit.UNUSED_DIFFUSERS.match(key))
    if component == TEXT:
        return bool(layout_text.UNUSED_HUGGINGFACE.match(key))
    return False


def read_names(file: WeightFile) -> Names | None:
    """Sort the keys of a full checkpoint, or None when no component of a Wan model is recognised."""
    told = _marker(file.keys())
    if told is None:
        return None
    component, naming, prefix = told
    rename = _renamer(component, naming, file, prefix)
    names = Names(component, naming, prefix, {}, [], [])
    companions = set(file.companions())
    for key in file:
        bare = key.removeprefix(prefix)
        if key in companions:
            names.unused.append(key)
        elif not key.startswith(prefix):
            (names.unused if key.startswith(OTHER_COMPONENTS) else names.refused).append(key)
        elif _known_unused(component, naming, bare):
            names.unused.append(key)
        elif (canonical := rename(bare)) is not None:
            names.found[canonical] = key
        else:
            names.refused.append(key)
    return names


def looks_like(keys: list[str]) -> str:
    """A guess, in words, at what a file is that is no Wan model: used in refusals only."""
    text = " ".join(keys[:400])
    if re.search(r"lora_unet_(down|up|input|output|middle)_blocks?_|input_blocks\.", text):
        return "it looks like a Stable Diffusion or SDXL file"
    if "vace_blocks." in text:
        return "it looks like the VACE part of a Wan model, without the model itself"
    if "double_blocks" in text or "single_transformer_blocks" in text:
        return "it looks like a Flux or HunyuanVideo file"
    if "transformer_blocks" in text:
        return "it looks like an LTX, CogVideoX or other diffusers file, not Wan"
    if "visual.transformer" in text or "text_model.encoder" in text or "vision_model" in text:
        return "it looks like a CLIP file"
    return "none of its names is known"
