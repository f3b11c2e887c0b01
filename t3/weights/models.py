"""Say what a file of weights is, from its names and shapes alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import T3Error
from .adapter_file import AdapterFile, is_adapter, read_adapter
from .catalogue import ALSO, LATENT_KEYS, family_of, latent_statistics, name_of, name_of_width
from .dialects import DIT, VAE, Names, looks_like, read_names
from .files import WeightFile
from .header import FLOAT_TYPES
from .layout_dit import Layout, dit_config, dit_layout, width
from .layout_text import text_config, text_layout
from .layout_vae import vae_config, vae_layout
from .scales import companion_of

PLAN_KEY = "t3.plan"
# A config.json beside the weights counts only if diffusers wrote it for the class we build; what it may add are facts
# that shapes cannot show.
_CLASSES = ("WanTransformer3DModel", "AutoencoderKLWan")


@dataclass
class Identity:
    """What a file is.

    Attributes:
        component: "dit", "vae", "text-encoder", or "unknown".
        form: "full", "lora", "diff", "lora+diff", or "unknown".
        dialect: how names are spelled, for people.
        model: a name from `t3/configs`, "custom" (same architecture, other sizes), a relative that is recognised and
            not run here ("wan-vace-14b", ...), or "unknown".
        config: the library's config for a full model; None for adapters and unknown files.
        matched, unused, refused: keys of the file by what becomes of them.
        plan: JSON text of the T3 plan the weights were tuned for, or None when the file does not say.
        problem: why the file cannot be used, as a sentence with the way out; None when it can.
        notes: things a user should know that are no reason to stop.
        names: canonical name -> key in the file, for full models.
        width: width of the token stream, for transformers and their adapters.
    """

    component: str
    form: str
    dialect: str
    model: str
    config: dict[str, Any] | None = None
    matched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    plan: str | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    width: int | None = None

    @property
    def tuned(self) -> str:
        """Whether the weights are T3-tuned: "yes" when the file carries its plan, else "cannot tell"."""
        return "yes" if self.plan is not None else "cannot tell"

    def describe(self) -> str:
        """One line for people."""
        what = self.model
        if self.form == "full" and self.model in ALSO:
            what += f" or a {ALSO[self.model]}"
        if self.width and self.model in ("custom", "unknown"):
            what += f", {name_of_width(self.width)}"
        keys = f"{len(self.matched)} keys matched, {len(self.unused)} unused, {len(self.refused)} refused"
        parts = [f"{what}: {self.component}, {self.form}, {self.dialect} names", keys, f"T3-tuned: {self.tuned}"]
        return "; ".join(parts + self.notes + ([f"cannot be used: {self.problem}"] if self.problem else []))


def layout_of(component: str, config: dict[str, Any]) -> Layout:
    """Every parameter of a component: canonical name -> (library name, shape)."""
    return {DIT: dit_layout, VAE: vae_layout}.get(component, text_layout)(config)


def some(names: list[str], count: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(repr(name) for name in names[:count]) + (", ..." if len(names) > count else "")


def identify(file: WeightFile) -> Identity:
    """Recognise a file of weights, from headers alone.

    An unusable file gives an Identity with `problem` set. Raises T3Error only for a broken file.
    """
    found = _identify_adapter(file) if is_adapter(file) else _identify_full(file)
    found.plan = file.metadata.get(PLAN_KEY)
    return found


def _identify_full(file: WeightFile) -> Identity:
    names = read_names(file)
    if names is None:
        keys = file.keys()
        guess = looks_like(keys)
        problem = f"{file.path} is no Wan model: {guess} (first: {some(keys)})."
        return Identity("unknown", "unknown", "unknown", "unknown", refused=keys, problem=problem)
    found = Identity(names.component, "full", names.dialect, "custom", unused=names.unused, refused=names.refused)
    found.names = names.found
    found.matched = list(names.found.values())
    shapes = {canonical: file.shape(key) for canonical, key in names.found.items()}
    if names.component == DIT and "head.modulation" in shapes:
        found.width = shapes["head.modulation"][-1]
    bare = [key.removeprefix(names.prefix) for key in names.refused]
    if names.component == DIT and (family := family_of(bare, found.width)):
        found.model = family
        found.problem = (
            f"{file.path} is a {family} model. Only plain Wan text- and image-to-video models run headless so far; "
            "use it in ComfyUI."
        )
        return found
    try:
        found.config = _config(file, names, shapes, found)
        layout = layout_of(names.component, found.config)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        found.problem = f"{file.path} is no whole Wan {names.component}: {reason}. Download or export it again."
        return found
    _check(file, found, shapes, layout)
    return found


def _config(file: WeightFile, names: Names, shapes: dict[str, tuple[int, ...]], found: Identity) -> dict[str, Any]:
    beside = file.sibling_config()
    if beside.get("_class_name") not in _CLASSES:
        beside = {}
    if names.component == DIT:
        heads = _heads(file, beside)
        # A stated head count stands in for the rule "128 per head", so the rule may not stop it.
        probe = shapes if not heads else {**shapes, "head.modulation": (1, 2, 128)}
        config = dit_config(probe)
        if heads:
            if found.width is None or found.width % heads:
                raise ValueError(f"{heads} heads do not divide the width {found.width}")
            config.update(num_attention_heads=heads, attention_head_dim=found.width // heads)
        config.update({key: beside[key] for key in ("eps", "rope_max_seq_len") if key in beside})
    elif names.component == VAE:
        config = vae_config(shapes)
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
    found.model = name_of(names.component, config) or "custom"
    return config


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
    found.refused += extra
    found.matched = list(found.names.values())
    missing = [name for name in layout if name not in shapes]
    wrong = [name for name in layout if name in shapes and shapes[name] != layout[name].shape]
    whole = [key for key in found.matched if file.dtype(key) not in FLOAT_TYPES and not companion_of(key, file)]
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
            f"first {some(found.refused)}."
        )


def adapter_width(file: WeightFile, adapter: AdapterFile) -> int | None:
    """Width of the model an adapter was made for, from its attention and FFN shapes; None when nothing tells."""
    for piece in adapter.pieces:
        module = piece.target.split(".", 2)[-1]
        if module == "modulation" or piece.target == "head.modulation":
            return file.shape(piece.keys["diff"])[-1] if "diff" in piece.keys else None
        if module.startswith(("self_attn.", "cross_attn.", "ffn.2", "norm3")):
            rows = file.shape(piece.keys["up"] if piece.kind == "lora" else piece.keys["diff"])
            if rows:
                return rows[0]
        if module.startswith("ffn.0.weight"):
            return file.shape(piece.keys["down"] if piece.kind == "lora" else piece.keys["diff"])[-1]
    return None


def _adapter_model(adapter: AdapterFile, wide: int | None) -> str:
    image = any("_img" in piece.target or piece.target.startswith("img_emb.") for piece in adapter.pieces)
    if wide == 5120:
        return "wan2.1-i2v-14b" if image else "wan-14b"
    return {1536: "wan2.1-t2v-1.3b", 3072: "wan2.2-ti2v-5b"}.get(wide or 0, "custom") if wide else "unknown"


def _identify_adapter(file: WeightFile) -> Identity:
    adapter = read_adapter(file)
    found = Identity(DIT, adapter.form, adapter.dialect, "unknown", matched=adapter.matched)
    found.refused, found.notes = list(adapter.refused), adapter.notes
    found.width = adapter_width(file, adapter)
    found.model = _adapter_model(adapter, found.width)
    if adapter.naming != "original" and "diffusers" not in adapter.dialect:
        found.dialect += f" ({adapter.naming} names)"
    if not adapter.pieces:
        found.component, found.form = "unknown", "unknown"
        found.problem = refused_text(file, adapter.refused, looks_like(file.keys()))
    elif adapter.refused:
        found.problem = refused_text(file, adapter.refused, "")
    return found


def refused_text(file: WeightFile, refused: dict[str, str], guess: str) -> str:
    """One sentence for adapter keys that cannot be placed, by reason, with examples."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in refused.items():
        by_reason.setdefault(reason, []).append(key)
    parts = [f"{len(keys)} keys are {reason} (first {some(keys, 2)})" for reason, keys in by_reason.items()]
    tail = f"; {guess}" if guess else ""
    return f"{file.path} cannot be applied: {'; '.join(parts)}{tail}. Use a LoRA or diff made for a Wan transformer."


def config_width(config: Any) -> int:
    """Width of a loaded `WanTransformer3DModel`, from its config."""
    return width(dict(config))


def require(found: Identity, component: str, option: str) -> None:
    """Raise T3Error unless the file is a whole, usable model of `component`."""
    if found.component != "unknown" and found.component != component:
        raise T3Error(
            f"This file is a {found.component} ({found.model}), not a {component}. Give {option} another file."
        )
    if found.form not in ("full", "unknown"):
        raise T3Error(
            f"This file is an adapter ({found.form}), not a whole {component}. Give it as --lora or --t3-weights."
        )
    if found.problem:
        raise T3Error(found.problem)
