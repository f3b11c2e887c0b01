"""The transformer to train and the plan it is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel

from ..cli import say
from ..errors import T3Error
from ..plan import Grid, Plan
from ..plan_choice import resolve_plan
from ..sources import Sources, find_sources
from ..weights import apply_weights, identify, known_config, load_transformer, open_weights
from ..weights.identity import require
from .config import Model
from .operator import with_dense_layers

if TYPE_CHECKING:
    from .data import Clips


@dataclass(frozen=True)
class Found:
    """What `[model]` names, before it is loaded: where it lies, its plan, and why that one."""

    asked: Model
    sources: Sources
    plan: Plan
    reason: str

    @property
    def config(self) -> dict[str, Any]:
        return self.sources.transformer

    @property
    def name(self) -> str:
        return self.sources.name


def find(asked: Model) -> Found:
    """Find and check the model and its plan; headers are read, no weights. Raises `T3Error`."""
    sources = _sources(asked)
    if sources.needs_image or sources.is_vace:
        raise T3Error(
            f"{sources.name} takes {'control clips' if sources.is_vace else 'an image'} beside the text; only "
            "text-to-video models can be trained. Train the one of the same family and size: a LoRA of its blocks fits."
        )
    if asked.part == "transformer_2" and sources.experts < 2:
        raise T3Error(f'[model] part is "transformer_2", and {sources.name} has one transformer. Use "transformer".')
    plan, reason = resolve_plan(asked.plan, sources)
    return Found(asked, sources, with_dense_layers(plan, asked.dense_layers, sources.transformer["num_layers"]), reason)


def _sources(asked: Model) -> Sources:
    applied: dict[str, Any] = {"t3_weights": [asked.t3_weights] if asked.t3_weights else [], "loras": asked.loras}
    parts: dict[str, Any] = {name: getattr(asked, name) or None for name in ("vae", "text_encoder", "tokenizer")}
    if asked.source or not asked.dit or asked.vae:
        return find_sources(model=asked.source or None, dit=asked.dit, **parts, **applied)
    # Training on encoded clips needs the transformer alone; what its VAE is follows from its channels.
    file = open_weights(asked.dit[0])
    found = identify(file)
    require(found, "dit", "dit")
    assert found.config is not None
    vae = known_config("wan2.2-vae" if found.config["out_channels"] == 48 else "wan2.1-vae")
    alone = Sources(found.model, found.config, vae, dits=tuple(map(Path, asked.dit)), plan_json=found.plan)
    if any(applied.values()):
        raise T3Error("[model] t3_weights and loras on a lone dit need vae and text_encoder too, to be checked.")
    return alone


def load(found: Found, dtype: torch.dtype) -> WanTransformer3DModel:
    """Load the transformer on the CPU, in `dtype` save what the library keeps in float32, with everything applied."""
    from ..pipeline import fetch_folder, load_part

    sources, second = found.sources, found.asked.part == "transformer_2"
    if sources.dits:
        transformer = load_transformer(sources.dits[-1 if second else 0], dtype=dtype)
    else:
        transformer = load_part(WanTransformer3DModel, fetch_folder(sources), found.asked.part, dtype)
    for adapter in (*sources.t3_weights, *sources.loras):
        report = apply_weights(transformer, open_weights(adapter.path), adapter.strength)
        say(f"{adapter.path.name}: {report.describe()}")
    return transformer


def check_grids(found: Found, clips: Clips) -> list[str]:
    """Words on grids where the plan does nothing, which would be a surprise after a day of training."""
    if all(layer == (1, 1, 1) for layer in found.plan.layers):
        return []
    patch, layers = found.config["patch_size"], found.config["num_layers"]
    notes = []
    for shape in sorted({pool.shape[1:] for pool in clips.pools}):
        grid = Grid(*(n // p for n, p in zip(shape, patch, strict=True)))
        if all(partition.windows == 1 for partition in found.plan.partitions(grid, layers)):
            notes.append(f"on a grid of {tuple(grid)} tokens the plan {found.plan.name!r} is dense in every layer.")
    return notes


def trained_grid(clips: Clips, patch: tuple[int, ...]) -> Grid:
    """The largest grid that is trained on."""
    shapes = [pool.shape[1:] for pool in clips.pools]
    return max((Grid(*(n // p for n, p in zip(shape, patch, strict=True))) for shape in shapes), key=lambda g: g.tokens)
