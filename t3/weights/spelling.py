"""Write canonical names in a dialect: the way back from `dialects` and `adapter_keys`.

Two kinds of dialect exist. Some name a LoRA's alpha by a tensor; PEFT, diffusers and DiffSynth have none in their files
and read A and B as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import T3Error
from . import layout_dit
from .dialects import DIT, TEXT
from .models import layout_of


@dataclass(frozen=True)
class Dialect:
    """How one family of programs writes names.

    Attributes:
        name: what `--to` calls it.
        adapter_prefix, full_prefix: what stands before a name; `full_prefix` None where whole models are not written.
        naming: "original" or "diffusers" module names.
        underscored: module names with underscores for dots.
        down, up: suffixes of a LoRA's A and B.
        alpha: whether alpha is a tensor of its own.
        up_bias: whether a LoRA's bias is `lora_B.bias`; else it is a `diff_b`.
    """

    name: str
    adapter_prefix: str
    full_prefix: str | None = ""
    naming: str = "original"
    underscored: bool = False
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: bool = True
    up_bias: bool = False

    def module(self, module: str) -> str:
        """An adapter's name for a canonical module or bare parameter: "diffusion_model.blocks.0.ffn.0"."""
        if self.naming == "diffusers":
            named = layout_dit.to_diffusers(f"{module}.weight")
            module = named.removesuffix(".weight") if named else layout_dit.to_diffusers(module) or module
        return self.adapter_prefix + (module.replace(".", "_") if self.underscored else module)


_PEFT_LAYER = ("lora_A.default.weight", "lora_B.default.weight")  # as PEFT's layers call them in memory
_FOR_ALL = ("original", "comfyui", "diffusers")  # the dialects that VAEs and text encoders come in
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("original", ""),
        # ComfyUI finds a whole model under the longer prefix only.
        Dialect("comfyui", "diffusion_model.", "model.diffusion_model."),
        Dialect("diffusers", "transformer.", naming="diffusers", alpha=False, up_bias=True),
        Dialect("peft", "base_model.model.", None, alpha=False, up_bias=True),
        Dialect("diffsynth", "pipe.dit.", "pipe.dit.", "original", False, *_PEFT_LAYER, alpha=False),
        Dialect("kohya", "lora_unet_", None, underscored=True, down="lora_down.weight", up="lora_up.weight"),
    )
}


def dialect_of(name: str) -> Dialect:
    """A dialect by name. Raises T3Error for any other."""
    if name not in DIALECTS:
        raise T3Error(f"unknown dialect {name!r}; known are {', '.join(DIALECTS)}.")
    return DIALECTS[name]


def full_names(component: str, config: dict[str, Any], dialect: Dialect) -> dict[str, str]:
    """Canonical name -> key of a whole model in a dialect.

    Raises T3Error where the dialect has no whole models of this component.
    """
    able = [other.name for other in DIALECTS.values() if other.full_prefix is not None]
    able = able if component == DIT else [name for name in able if name in _FOR_ALL]
    if dialect.name not in able:
        raise T3Error(f"{dialect.name} has no names for a whole {component}; those that do: {', '.join(able)}.")
    # ComfyUI reads the VAE under original names and the text encoder under those of transformers.
    library = dialect.name == "diffusers" or (component == TEXT and dialect.name == "comfyui")
    prefix = dialect.full_prefix or "" if component == DIT else ""
    return {
        canonical: prefix + (param.name if library else canonical)
        for canonical, param in layout_of(component, config).items()
    }
