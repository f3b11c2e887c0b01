"""The result as a file that `t3.generate`, `t3.inspect` and the ComfyUI loader take as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..plan import Grid, Plan
from ..weights.catalogue import transformer_name
from ..weights.dialects import DIT
from ..weights.extract import is_matrix
from ..weights.fingerprint import Fingerprint, fingerprint
from ..weights.layout_dit import to_original
from ..weights.metadata import T3Metadata
from ..weights.spelling import dialect_of, full_names
from ..weights.write import tensor_entry, write_safetensors
from .trainable import trained

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

PREFIX = "transformer."  # where the objective holds the model
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Before:
    """What of the untrained model is needed once it has been trained: its mark, and the small tensors that change."""

    mark: Fingerprint | None
    small: Mapping[str, torch.Tensor]


def mark_of(transformer: WanTransformer3DModel) -> Fingerprint | None:
    """The mark by which a LoRA's file names the weights it belongs on. Take it before adapters are added."""
    named = {to_original(name): parameter for name, parameter in transformer.named_parameters()}
    known = {name: parameter for name, parameter in named.items() if name is not None}
    return fingerprint(transformer_name(dict(transformer.config)), known, known.__getitem__)


def small_before(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained tensors that are no LoRA's, by name."""
    named = trained(transformer).items()
    return {name: parameter.detach().cpu().clone() for name, parameter in named if "lora_" not in name}


def write_full(
    path: Path, weights: Mapping[str, torch.Tensor], config: dict[str, Any], plan: Plan | None, grid: Grid, dtype: str
) -> Path:
    """Write a whole transformer under the original names. `weights`: by the library's names."""
    from ..weights.models import layout_of

    names = full_names(DIT, config, dialect_of("original"))
    entries = []
    for canonical, parameter in layout_of(DIT, config).items():
        tensor = weights[parameter.name].detach()
        kind = getattr(torch, dtype) if is_matrix(canonical, tuple(tensor.shape)) else torch.float32
        entries.append(tensor_entry(names[canonical], tensor.to(kind)))
    return write_safetensors(path, entries, _header(plan, grid, None, None), overwrite=True)


def write_lora(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    before: Before,
    scale: float,
    plan: Plan | None,
    grid: Grid,
    dtype: str,
) -> Path:
    """Write a LoRA under ComfyUI's names, with the differences of the small tensors. `scale` goes into its B."""
    dialect, kind = dialect_of("comfyui"), getattr(torch, dtype)
    entries, rank = [], 0
    for name, tensor in weights.items():
        tensor = tensor.detach().float()
        if name.endswith((_DOWN, _UP)):
            down = name.endswith(_DOWN)
            module = dialect.module(_original(name.removesuffix(_DOWN).removesuffix(_UP) + ".weight"))
            rank = max(rank, tensor.shape[0] if down else tensor.shape[1])
            stored = tensor if down else tensor * scale
            entries.append(tensor_entry(f"{module}.{dialect.down if down else dialect.up}", stored.to(kind)))
        else:
            plain = name.replace(".base_layer.", ".")
            module, ending = dialect.module(_original(plain)), "diff_b" if plain.endswith(".bias") else "diff"
            entries.append(tensor_entry(f"{module}.{ending}", tensor - before.small[name].float()))
    return write_safetensors(path, entries, _header(plan, grid, before.mark, rank), overwrite=True)


def _original(name: str) -> str:
    """The original name of a parameter's module (or of a bare parameter)."""
    original = to_original(name)
    assert original is not None, f"{name} is no parameter of a Wan transformer"
    return original.removesuffix(".weight").removesuffix(".bias")


def _header(plan: Plan | None, grid: Grid, base: Fingerprint | None, rank: int | None) -> dict[str, str]:
    trained_on = grid if plan else None
    return T3Metadata(plan, trained_on, base, rank, f"t3.retrofit {__version__}").to_header()
