"""Weights in another dtype than the host computes in, and nobody who casts them.

With dynamic VRAM on, as on NVIDIA cards, ComfyUI 0.30.0 leaves the weights of linear layers in the dtype of the file
(`disable_weight_init._lazy_load_from_state_dict`), since `ModelPatcherDynamic` casts them as they are used. Of a model
that was loaded so, some nodes ask for a copy without dynamic VRAM: TorchCompileModel does. There nothing casts, and
where file and host differ the first linear layer fails, with T3 or without: "mat1 and mat2 must have the same dtype".
The host has a switch for it on each patcher, which is turned on here for clones that carry T3.
"""

from __future__ import annotations

import uuid
from typing import Any

import comfy.ops
import torch


def have_weights_cast(model) -> str | None:
    """Have the host cast the weights of `model`, a patcher the caller may change, if it would fail for not doing so.

    Returns what was found, in words, or None where all is well.
    """
    wanted = model.model.get_dtype_inference()
    stored = _uncast(model.model.diffusion_model, wanted)
    if model.is_dynamic() or model.force_cast_weights or stored is None:
        return None
    model.force_cast_weights = True
    # Where the model is loaded already, without the switch, it is to be loaded anew.
    model.patches_uuid = uuid.uuid4()
    return (
        f"ComfyUI kept weights in {_name(stored)} and computes in {_name(wanted)}, which fails in this copy of the "
        "model with T3 or without (it was made without dynamic VRAM); so they are cast at each use."
    )


def _uncast(diffusion_model: Any, wanted: torch.dtype) -> torch.dtype | None:
    """The dtype of weights that an ordinary linear layer would use as they are on inputs of dtype `wanted`."""
    for module in diffusion_model.modules():
        # Exactly this class: others cast, or have a way of their own. Some layers compute in float32 for themselves.
        if type(module) is comfy.ops.disable_weight_init.Linear and not module.comfy_cast_weights:
            weight = module.weight
            if weight is not None and weight.dtype in (torch.float16, torch.bfloat16) and weight.dtype != wanted:
                return weight.dtype
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
