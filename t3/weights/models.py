"""Say what a file of weights is, from its names and shapes alone."""

from __future__ import annotations

import json
from typing import Any

from ..errors import T3Error
from .adapter_file import is_adapter
from .adapter_identity import identify_adapter
from .catalogue import (
    CANNOT_TELL,
    HEADLESS_KINDS,
    LATENT_KEYS,
    family_of,
    kind_of,
    latent_statistics,
    name_of,
    not_headless,
    transformer_name,
)
from .config_beside import config_beside
from .dialects import DIT, VAE, Names, looks_like, read_names
from .files import WeightFile
from .gguf import PLAIN_TYPES
from .header import FLOAT_TYPES
from .identity import Identity, some
from .layout_dit import Layout, dit_config, dit_layout
from .layout_text import text_config, text_layout
from .layout_vae import vae_config, vae_layout
from .metadata import read_metadata
from .scales import WAY_OUT, companion_of, why_unread


def layout_of(component: str, config: dict[str, Any]) -> Layout:
    """Every parameter of a component: canonical name -> (library name, shape)."""
    return {DIT: dit_layout, VAE: vae_layout}.get(component, text_layout)(config)


def identify(file: WeightFile) -> Identity:
    """Recognise a file of weights, from headers alone.

    An unusable file gives an Identity with `problem` set; so does one whose T3 metadata cannot be read.
    """
    found = identify_adapter(file) if is_adapter(file) else _identify_full(file)
    try:
        found.t3 = read_metadata(file.metadata, file.path)
    except T3Error as error:
        found.problem = found.problem or str(error)
    return found


def _identify_full(file: WeightFile) -> Identity:
    names = read_names(file)
    if names is None:
        keys = file.keys()
        guess = looks_like(keys)
        problem = f"{file.path} is no Wan model: {guess} (first: {some(keys)})."
        refused = dict.fromkeys(keys, "no name of a Wan model")
        return Identity("unknown", "unknown", "unknown", "unknown", refused=refused, problem=problem)
    found = Identity(names.component, "full", names.dialect, "custom", unused=names.unused)
    found.refused = dict.fromkeys(names.refused, f"no parameter of a Wan {names.component}")
    found.names, found.naming, found.prefix = names.found, names.naming, names.prefix
    found.matched = list(names.found.values())
    shapes = {canonical: file.shape(key) for canonical, key in names.found.items()}
    if names.component == DIT and "head.modulation" in shapes:
        found.width = shapes["head.modulation"][-1]
    bare = [key.removeprefix(names.prefix) for key in names.refused]
    if names.component == DIT and (family := family_of(bare)):
        found.model, found.kind = family, family.removeprefix("wan-")
        found.problem = (
            f"{file.path} is a {family} model, known here by name only: {len(bare)} of its tensors are placed nowhere. "
            "It does not run headless; use it in ComfyUI."
        )
        return found
    try:
        found.config = _config(file, names, shapes, found)
        layout = layout_of(names.component, found.config)
    except T3Error as error:
        found.problem = (
            f"{file.path}: what the config.json beside it says of it is unknown. {error} Repair that file, or move it "
            "away if it belongs to another model."
        )
        return found
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        found.problem = f"{file.path} is no whole Wan {names.component}: {reason}. Download or export it again."
        return found
    _check(file, found, shapes, layout)
    _say_where_it_runs(file, found)
    return found


def _say_where_it_runs(file: WeightFile, found: Identity) -> None:
    assert found.config is not None
    try:
        found.quantised = _quantised(file, found.matched)
    except T3Error as error:
        found.problem = found.problem or str(error)
    found.elsewhere = found.quantised
    if found.component != DIT:
        return
    found.kind = kind_of(found.config)
    if found.model in CANNOT_TELL:
        found.notes.append(CANNOT_TELL[found.model])
    if found.kind not in HEADLESS_KINDS:
        found.elsewhere = f"{file.path} is a {found.model} model. {not_headless(found.kind)}"
        if found.quantised:  # and then it cannot be merged into either
            found.elsewhere += f" {found.quantised}"
    elif file.container == "gguf":
        found.elsewhere = (
            f"{file.path} is a GGUF file, whose quantised tensors are not read headless. Use the bf16, fp16 or "
            "scaled-fp8 version of these weights, or load it in ComfyUI."
        )


def _quantised(file: WeightFile, keys: list[str]) -> str | None:
    """Why numbers of a file are not read here, though its names and shapes are known."""
    if file.container == "gguf":
        unread = [f"{key!r} is quantised as {file.dtype(key)}" for key in keys if file.dtype(key) not in PLAIN_TYPES]
    else:
        unread = [reason for key in keys if (reason := why_unread(file, key))]
    if not unread:
        return None
    return (
        f"{file.path}: the numbers of {len(unread)} tensors are not read here; {unread[0]}. "
        f"{WAY_OUT.removesuffix('.')}, or load the file in ComfyUI."
    )


def _config(file: WeightFile, names: Names, shapes: dict[str, tuple[int, ...]], found: Identity) -> dict[str, Any]:
    if names.component == DIT:
        config = _dit_config(file, shapes, found)
    elif names.component == VAE:
        config = vae_config(shapes)
        beside = _beside(file, found, config)
        statistics: dict[str, Any] = {key: beside[key] for key in LATENT_KEYS if key in beside}
        if len(statistics) < len(LATENT_KEYS):
            statistics = latent_statistics(config["z_dim"])
        if not statistics:
            z = config["z_dim"]
            statistics = {"latents_mean": [0.0] * z, "latents_std": [1.0] * z}
            found.notes.append(f"no latent mean and std known for {z} channels: taken as 0 and 1")
        config.update(statistics)
    else:
        config = text_config(shapes)
    found.model = transformer_name(config) if names.component == DIT else name_of(names.component, config) or "custom"
    return config


def _dit_config(file: WeightFile, shapes: dict[str, tuple[int, ...]], found: Identity) -> dict[str, Any]:
    # A stated head count stands in for the rule "128 per head", so the rule may not stop it.
    any_heads = dit_config({**shapes, "head.modulation": (1, 2, 128)})
    beside = _beside(file, found, any_heads)
    heads = _heads(file, beside)
    config = any_heads if heads else dit_config(shapes)
    if heads:
        if found.width is None or found.width % heads:
            raise ValueError(f"{heads} heads do not divide the width {found.width}")
        config.update(num_attention_heads=heads, attention_head_dim=found.width // heads)
    config.update({key: beside[key] for key in ("eps", "rope_max_seq_len") if key in beside})
    if "vace_layers" in config and "vace_layers" in beside:
        config["vace_layers"] = _vace_layers(beside["vace_layers"], config)
    return config


def _beside(file: WeightFile, found: Identity, sizes: dict[str, Any]) -> dict[str, Any]:
    beside, odd = config_beside(file, found.component, sizes, found.width)
    if odd:
        found.strange_config = True
        found.notes.append(odd)
    return beside


def _vace_layers(stated: Any, config: dict[str, Any]) -> list[int]:
    """Where the VACE blocks join, as a config.json states it; the weights do not say."""
    count, layers = len(config["vace_layers"]), config["num_layers"]
    fits = isinstance(stated, list) and len(stated) == count and all(isinstance(layer, int) for layer in stated)
    if not (fits and stated == sorted(set(stated)) and stated[0] == 0 and stated[-1] < layers):
        raise ValueError(f"its config.json has vace_layers {stated}, not {count} rising numbers from 0 to {layers - 1}")
    return stated


def _heads(file: WeightFile, beside: dict[str, Any]) -> int | None:
    """The head count the file itself states (ComfyUI's `config` metadata, or diffusers' config.json beside it)."""
    try:
        stated = json.loads(file.metadata.get("config", "{}")).get("transformer", {}).get("num_heads")
    except (ValueError, AttributeError):
        stated = None
    stated = stated or beside.get("num_attention_heads")
    return stated if isinstance(stated, int) and stated > 0 else None


def _check(file: WeightFile, found: Identity, shapes: dict[str, tuple[int, ...]], layout: Layout) -> None:
    """Compare what the file holds with what a model of its config needs."""
    extra = [found.names.pop(name) for name in [name for name in found.names if name not in layout]]
    found.refused.update(dict.fromkeys(extra, "no parameter of a model of these sizes"))
    found.matched = list(found.names.values())
    missing = [name for name in layout if name not in shapes]
    wrong = [name for name in layout if name in shapes and shapes[name] != layout[name].shape]
    whole = [key for key in found.matched if file.dtype(key) not in FLOAT_TYPES and not companion_of(key, file)]
    if file.container == "gguf":
        whole = []  # quantised as its format says
    if missing and all(".pos_embedding." in name for name in missing):
        found.problem = (
            f"{file.path} is a T5 encoder; Wan needs umT5, which has a position table in every layer. Give umt5-xxl."
        )
    elif missing:
        found.problem = (
            f"{file.path} is incomplete: {len(missing)} of the {len(layout)} tensors of a {found.model} "
            f"{found.component} are missing, first {some(missing)}."
        )
    elif wrong:
        name = wrong[0]
        found.problem = (
            f"{file.path} does not fit together: {len(wrong)} tensors have the wrong shape, first {name!r} with "
            f"{list(shapes[name])} where the others ask for {list(layout[name].shape)}."
        )
    elif whole:
        found.problem = (
            f"{file.path}: {len(whole)} tensors are quantised without a scale that is read here, first {whole[0]!r} "
            f"({file.dtype(whole[0])}). Use the bf16, fp16 or scaled-fp8 version of these weights."
        )
    elif found.refused:
        found.problem = (
            f"{file.path}: {len(found.refused)} tensors belong to no Wan {found.component}, "
            f"first {some(list(found.refused))}."
        )
