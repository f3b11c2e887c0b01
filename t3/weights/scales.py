"""Scaled fp8 weights as ComfyUI stores them: a low-precision tensor and a companion that scales it back.

Two spellings are in use (facts from ComfyUI 0.30's loader): `X.scale_weight` with a global `scaled_fp8` marker, and
`X.weight_scale` with a per-layer `X.comfy_quant` JSON or a `_quantization_metadata` entry in the file's metadata.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import T3Error

if TYPE_CHECKING:
    import torch

    from .files import WeightFile

WEIGHT_SCALES = ("scale_weight", "weight_scale")
OTHER_COMPANIONS = ("scale_input", "input_scale", "comfy_quant", "weight_scale_2", "pre_quant_scale")
QUANTISED_LAYERS = "_quantization_metadata"  # ComfyUI's list of quantised layers, by name
SCALE_TYPES = ("F64", "F32", "F16", "BF16")
WAY_OUT = "Use the bf16, fp16 or scaled-fp8 version of these weights."
READABLE_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def is_companion(key: str, file: WeightFile) -> bool:
    """Whether a tensor only describes how another one is stored."""
    stem, _, last = key.rpartition(".")
    if last == "scaled_fp8":
        return True
    return last in (*WEIGHT_SCALES, *OTHER_COMPANIONS) and f"{stem}.weight" in file


def companion_of(key: str, file: WeightFile) -> str | None:
    """The name of the tensor that scales `key` back to real numbers, if the file has one."""
    stem, _, last = key.rpartition(".")
    if last != "weight":
        return None
    return next((name for scale in WEIGHT_SCALES if (name := f"{stem}.{scale}") in file), None)


def _declared_format(file: WeightFile, key: str) -> str | None:
    stem = key.rpartition(".")[0]
    try:
        if f"{stem}.comfy_quant" in file:
            layer: Any = json.loads(b"".join(file.pieces(f"{stem}.comfy_quant")))
        else:
            layer = _listed_layers(file.metadata.get(QUANTISED_LAYERS, "{}")).get(stem)
        return None if layer is None else str(layer["format"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise T3Error(f"{file.path}: the quantisation note of {key!r} cannot be read.") from error


@functools.lru_cache(maxsize=4)  # asked for every tensor of a file
def _listed_layers(text: str) -> dict[str, Any]:
    return json.loads(text).get("layers", {})


def why_unread(file: WeightFile, key: str) -> str | None:
    """Why `unscale` cannot read a tensor, in words, or None when it can or has nothing to do.

    Reads the header, and what the file notes on the format, but no weights; needs no tensor library.
    Raises T3Error when that note cannot be read.
    """
    scale = companion_of(key, file)
    if scale is None:
        return None
    declared, stored = _declared_format(file, key), file.dtype(key)
    if declared in READABLE_FORMATS and stored == "U8":  # older writers stored the fp8 bytes as uint8
        stored = READABLE_FORMATS[declared]
    if stored not in READABLE_FORMATS.values() or (declared is not None and declared not in READABLE_FORMATS):
        return f"{key!r} is quantised as {declared or stored}, which is not read here"
    shape, scales = file.shape(key), file.shape(scale)
    rows = shape[0] if shape else 1
    if math.prod(scales) not in (1, rows) or file.dtype(scale) not in SCALE_TYPES:
        return (
            f"{scale!r} is {file.dtype(scale)} of shape {list(scales)}; a scale that is read here is one floating "
            f"point number or one per output row ({rows})"
        )
    return None


def rename_layers(file: WeightFile, rename: Callable[[str], str | None]) -> dict[str, str]:
    """A file's metadata, with the layers that ComfyUI's list of quantised ones names renamed; None takes one out.

    Raises T3Error when the list cannot be read.
    """
    if QUANTISED_LAYERS not in file.metadata:
        return dict(file.metadata)
    try:
        content = json.loads(file.metadata[QUANTISED_LAYERS])
        layers = {new: value for stem, value in content["layers"].items() if (new := rename(stem)) is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise T3Error(f"{file.path}: its metadata entry `{QUANTISED_LAYERS}` cannot be read.") from error
    kept = {key: value for key, value in file.metadata.items() if key != QUANTISED_LAYERS}
    return {**kept, QUANTISED_LAYERS: json.dumps({**content, "layers": layers})} if layers else kept


def unscale(file: WeightFile, key: str, weight: torch.Tensor, scale_key: str) -> torch.Tensor:
    """float32 `weight * scale`; the scale is one number or one per output row.

    Raises T3Error for formats whose bytes are not plain fp8 (nvfp4, mxfp8, rotated int8, ...).
    """
    import torch

    if unread := why_unread(file, key):
        raise T3Error(f"{file.path}: {unread}. {WAY_OUT}")
    declared = _declared_format(file, key)
    if weight.dtype == torch.uint8:  # as `why_unread` lets pass
        weight = weight.view(getattr(torch, str(declared)))
    scale = file.read_raw(scale_key)
    factor = scale.float().reshape(()) if scale.numel() == 1 else scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return weight.float() * factor
