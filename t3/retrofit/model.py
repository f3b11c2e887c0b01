"""The transformer to train and the plan it is trained for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from ..cli import say
from ..errors import T3Error
from ..plan import Grid, Plan
from ..plan_choice import resolve_plan
from ..sources import BOUNDARY, Sources, find_sources
from ..weights import apply_weights, identify, known_config, load_transformer, open_weights
from ..weights.catalogue import kind_of
from ..weights.identity import require
from ..weights.load import transformer_class
from .conditioning import GIVEN_WORDS, KINDS
from .config import Config, Model
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

    @property
    def noise_range(self) -> tuple[float, float]:
        """The noise levels that the transformer is for: of two experts the first has those from the boundary on."""
        boundary = self.asked.boundary or self.sources.boundary
        if not boundary and self.sources.experts < 2:
            return 0.0, 1.0
        boundary = boundary or BOUNDARY[self.sources.needs_image]
        return (0.0, boundary) if self.asked.part == "transformer_2" else (boundary, 1.0)


def find(asked: Model) -> Found:
    """Find and check the model and its plan; headers are read, no weights. Raises `T3Error`."""
    sources = _sources(asked)
    if (kind := kind_of(sources.transformer)) not in KINDS:
        raise T3Error(
            f"{sources.name} takes {sources.transformer['in_channels']} channels and makes "
            f"{sources.transformer['out_channels']}, which is none of what can be trained: {', '.join(KINDS)} (found: "
            f"{kind}). Train the text-to-video model of the same family and size: a LoRA of its blocks fits."
        )
    if asked.part == "transformer_2" and sources.experts < 2 and not asked.boundary:
        raise T3Error(
            f'[model] part is "transformer_2", and {sources.name} has one transformer. Use "transformer"; or, if the '
            "file is A14B's expert for low noise, say up to where: boundary = 0.875 (image-to-video: 0.9)."
        )
    plan, reason = resolve_plan(asked.plan, sources)
    return Found(asked, sources, with_dense_layers(plan, asked.dense_layers, sources.transformer["num_layers"]), reason)


def _sources(asked: Model) -> Sources:
    applied: dict[str, Any] = {"t3_weights": [asked.t3_weights] if asked.t3_weights else [], "loras": asked.loras}
    parts: dict[str, Any] = {name: getattr(asked, name) or None for name in ("vae", "text_encoder", "tokenizer")}
    if asked.source or not asked.dit or asked.vae:
        return find_sources(model=asked.source or None, dit=asked.dit, **parts, **applied)
    # Training on encoded clips needs the transformer alone; what its VAE is follows from its channels.
    if len(asked.dit) > 2:
        raise T3Error(f"[model] {len(asked.dit)} files are named as dit; name one, or A14B's two, high noise first.")
    files = [identify(open_weights(path)) for path in asked.dit]
    for found in files:
        require(found, "dit", "dit")
    configs = [found.config for found in files]
    if configs[0] != configs[-1]:
        names = f"{files[0].model}, {files[-1].model}"
        raise T3Error(f"[model] the two dit files differ in shape ({names}): they are no experts of one model.")
    config, found = configs[0], files[-1 if asked.part == "transformer_2" else 0]
    assert config is not None
    vae = known_config("wan2.2-vae" if config["out_channels"] == 48 else "wan2.1-vae")
    dits = tuple(map(Path, asked.dit))
    # Where there are two, `load` takes the one that is trained.
    alone = Sources(found.model, config, vae, dits=dits, experts=len(dits), plan_json=found.plan)
    if any(applied.values()):
        raise T3Error("[model] t3_weights and loras on a lone dit need vae and text_encoder too, to be checked.")
    return alone


def at_its_noise(config: Config, found: Found) -> Config:
    """`config` with every stage at noise levels that the trained transformer is for. Raises `T3Error` where a stage
    has none."""
    low, high = found.noise_range
    stages = []
    for number, stage in enumerate(config.stages, 1):
        first, last = max(low, stage.sigma_min), min(high, stage.sigma_max)
        if first >= last:
            raise T3Error(
                f"[[stages]] {number} ({stage.name}) has noise levels {stage.sigma_min:g} to {stage.sigma_max:g}, and "
                f"this expert is for {low:g} to {high:g}. Leave sigma_min and sigma_max out, or train the other part."
            )
        stages.append(replace(stage, sigma_min=first, sigma_max=last))
    return replace(config, stages=tuple(stages))


def load(found: Found, dtype: torch.dtype) -> WanTransformer3DModel | WanVACETransformer3DModel:
    """Load the transformer on the CPU, in `dtype` save what the library keeps in float32, with everything applied."""
    from ..pipeline import fetch_folder, load_part

    sources, part = found.sources, found.asked.part if found.sources.experts > 1 else "transformer"
    if sources.dits:
        transformer = load_transformer(sources.dits[-1 if part == "transformer_2" else 0], dtype=dtype)
    else:
        transformer = load_part(transformer_class(sources.transformer), fetch_folder(sources), part, dtype)
    for adapter in (*sources.t3_weights, *sources.loras):
        report = apply_weights(transformer, open_weights(adapter.path), adapter.strength)
        say(f"{adapter.path.name}: {report.describe()}")
    return transformer


def describe(found: Found, clips: Clips) -> list[str]:
    """In words, what the model is given beside the text, and which noise it is for, where either is special."""
    conditioning, lines = clips.conditioning, []
    if conditioning.kind != "t2v":
        shares = ", ".join(f"{GIVEN_WORDS[name]} {share:.0%}" for name, share in conditioning.shares)
        lines.append(f"{KINDS[conditioning.kind]}; of the clips it is given: {shares}")
    if found.noise_range != (0.0, 1.0):
        low, high = found.noise_range
        lines.append(f'[model] part = "{found.asked.part}": an expert for noise levels {low:g} to {high:g}')
    return lines


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
