"""What is trained: everything, or a LoRA with or without the small tensors around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..errors import T3Error
from ..weights.layout_dit import to_original
from .tables import unknown

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

    from .config import Trainable

# Modules of a block, VACE's too, that a LoRA is put on, by the names of diffusers.
MODULES = {
    "self-attention": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    # The last two read an image's embedding, in models that take one.
    "cross-attention": (
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "attn2.add_k_proj",
        "attn2.add_v_proj",
    ),
    "ffn": ("ffn.net.0.proj", "ffn.net.2"),
}


def is_small(name: str, kinds: tuple[str, ...]) -> bool:
    """Whether a parameter is one of these kinds: "norms" of q and k, "biases", "modulation" tables."""
    last = name.rsplit(".", 1)[-1]
    return (
        ("norms" in kinds and last == "weight" and ".norm_" in name)
        or ("biases" in kinds and last == "bias" and name.startswith(("blocks.", "vace_blocks.")))
        or ("modulation" in kinds and last == "scale_shift_table")
    )


def make_trainable(transformer: WanTransformer3DModel, asked: Trainable, compute: torch.dtype) -> None:
    """Add what is asked for and let it, and nothing else, take gradients. In place.

    What is trained is float32 (the master weights), and so is what is frozen beside it; under a LoRA that is stored in
    `compute`, save where the library keeps float32. Raises `T3Error` when peft is missing, or a frozen name unknown.
    """
    if asked.what == "everything":
        transformer.requires_grad_(True)
        transformer.float()
        _freeze(transformer, asked.frozen)
        return
    transformer.requires_grad_(False)
    _store_frozen(transformer, compute)
    small = [parameter for name, parameter in transformer.named_parameters() if is_small(name, asked.also)]
    _add_lora(transformer, asked)
    for parameter in small:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _freeze(transformer: WanTransformer3DModel, beginnings: tuple[str, ...]) -> None:
    """Take no gradients for parameters whose original names begin so, by whole parts of a name."""
    named = {to_original(name) or name: parameter for name, parameter in transformer.named_parameters()}
    parts = {".".join(name.split(".")[:n]) for name in named for n in range(1, name.count(".") + 2)}
    for beginning in beginnings:
        if beginning not in parts:
            raise unknown(beginning, sorted(parts, key=len), "[trainable] frozen: this model")
        for name, parameter in named.items():
            if f"{name}.".startswith(f"{beginning}."):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise T3Error("[trainable] frozen leaves nothing to train. Name fewer parameters.")


def _add_lora(transformer: WanTransformer3DModel, asked: Trainable) -> None:
    try:
        from peft import LoraConfig
    except ImportError:
        raise T3Error("a LoRA needs the package peft: pip install peft.") from None
    modules = [module.replace(".", r"\.") for target in asked.targets for module in MODULES[target]]
    if not modules:
        raise T3Error("[trainable] targets is empty, so the LoRA would be on nothing. Name at least one.")
    config = LoraConfig(
        r=asked.rank,
        lora_alpha=asked.alpha or asked.rank,  # type: ignore[arg-type]  # peft divides it by r
        target_modules=rf"(vace_)?blocks\.\d+\.({'|'.join(modules)})",
        init_lora_weights=True,
    )
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _store_frozen(transformer: WanTransformer3DModel, dtype: torch.dtype) -> None:
    kept = transformer._keep_in_fp32_modules or []
    for name, parameter in transformer.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that take gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class Untouched:
    """The model as it was before training, out of the same memory: adapters off, small tensors put back meanwhile."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.transformer = transformer
        self.layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        self.small = [
            (parameter, parameter.detach().clone())
            for name, parameter in trained(transformer).items()
            if "lora_" not in name
        ]

    def to(self, device: torch.device) -> None:
        """Move the kept tensors to where the model will be."""
        self.small = [(parameter, former.to(device)) for parameter, former in self.small]

    @contextlib.contextmanager
    def restored(self) -> Iterator[WanTransformer3DModel]:
        """The untouched model, inside of a `with` block that builds no gradients."""
        for layer in self.layers:
            layer.enable_adapters(False)
        now = [parameter.data for parameter, _ in self.small]
        # Assigned, not copied: a graph that was built before keeps its tensors as they are.
        for parameter, former in self.small:
            parameter.data = former
        try:
            yield self.transformer
        finally:
            for (parameter, _), data in zip(self.small, now, strict=True):
                parameter.data = data
            for layer in self.layers:
                layer.enable_adapters(True)
