"""What a run would load, found out before anything is loaded: folders, hub ids and single files. No torch import."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapters import EXPERTS, Adapter, existing, open_adapter
from .errors import T3Error
from .plan import Grid
from .plan_choice import carried_plan
from .weights import Identity, identify, known_config, open_weights, read_metadata
from .weights.identity import require
from .weights.layout_dit import dit_layout

# Hub ids whose sizes we know without downloading anything, for --dry-run.
HUB = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan2.1-t2v-1.3b", "wan2.1-vae"),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan2.1-t2v-14b", "wan2.1-vae"),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("wan2.1-i2v-14b", "wan2.1-vae"),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": ("wan2.1-i2v-14b", "wan2.1-vae"),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": ("wan2.1-flf2v-14b", "wan2.1-vae"),
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": ("wan2.1-vace-1.3b", "wan2.1-vae"),
    "Wan-AI/Wan2.1-VACE-14B-diffusers": ("wan2.1-vace-14b", "wan2.1-vae"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("wan2.2-ti2v-5b", "wan2.2-vae"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("wan2.2-t2v-a14b", "wan2.1-vae"),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ("wan2.2-i2v-a14b", "wan2.1-vae"),
}
# Noise level, as a part of 1, below which the second expert takes over (Wan2.2's released configs).
BOUNDARY = {False: 0.875, True: 0.9}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Sources:
    """Everything a run needs to know about its model before loading it.

    `transformer`, `vae`: their diffusers configs. `tuned`: whether the weights are T3-tuned ("yes", "cannot tell").
    `plan_json`: the plan that the weights say they were tuned for; `plan_from` says which do, for messages.
    `plan_conflict`: why no single plan can be taken from the weights, or None.
    """

    name: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    folder: Path | None = None
    hub_id: str | None = None
    embedded: bool = False
    dits: tuple[Path, ...] = ()
    vae_file: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    image_encoder: Path | None = None
    t3_weights: tuple[Adapter, ...] = ()
    loras: tuple[Adapter, ...] = ()
    experts: int = 1
    boundary: float | None = None
    plan_json: str | None = None
    plan_from: str = "the weights"
    plan_conflict: str | None = None
    tuned: str = "cannot tell"
    notes: tuple[str, ...] = ()

    @property
    def latent_channels(self) -> int:
        return self.vae["z_dim"]

    @property
    def pixels_per_token(self) -> int:
        """Height and width of the square of pixels that one token stands for."""
        return self.vae.get("scale_factor_spatial", 8) * self.transformer["patch_size"][1]

    def latent_bytes(self, grid: Grid) -> int:
        """The size of a clip's latents `[1, C, T, H, W]` in a file, in float32."""
        return 4 * self.latent_channels * grid.tokens * self.transformer["patch_size"][1] ** 2

    @property
    def parameters(self) -> int:
        """Weights of the transformer, of all experts together."""
        layout = dit_layout(self.transformer)
        return self.experts * sum(math.prod(parameter.shape) for parameter in layout.values())

    @property
    def needs_image(self) -> bool:
        """The transformer takes a conditioning video beside the noise: image-to-video, never without an image."""
        return self.transformer["in_channels"] > self.latent_channels

    @property
    def is_vace(self) -> bool:
        """VACE: beside the noise it takes a video that is kept, changed or, where its mask says so, made."""
        return "vace_layers" in self.transformer

    @property
    def takes_image(self) -> bool:
        """Wan2.2 5B and VACE start from an image or from nothing."""
        return self.needs_image or self.is_vace or self.latent_channels == 48

    @property
    def takes_last_image(self) -> bool:
        """Image-to-video models and VACE."""
        return self.needs_image or self.is_vace

    @property
    def needs_image_encoder(self) -> bool:
        return self.transformer.get("image_dim") is not None

    def check_experts(self) -> None:
        """Raise `T3Error` where one whole model would take the place of both experts. Changes may serve both."""
        whole = [one for one in self.t3_weights if one.strength and one.identity.form == "full"]
        if self.experts > len(self.t3_weights) and whole:
            raise T3Error(
                f"--t3-weights {whole[0].path} is a whole model, and {self.name} is two, each for its own noise: it "
                "would take the place of both. Instead give --t3-weights twice, high noise first; for one that is "
                "to stay as it is, its own file."
            )

    def loras_of(self, expert: int) -> list[Adapter]:
        """The LoRAs of one expert, counted from 0: those for all, and its own."""
        return [adapter for adapter in self.loras if adapter.expert in (None, expert)]

    @property
    def folder_now(self) -> Path | None:
        """`folder`; of a hub id that was downloaded since these were found, where it lies."""
        return self.folder or (_cached(self.hub_id) if self.hub_id else None)

    def fingerprint(self) -> list[list]:
        """Path, size and time of change of every file that decides what is sampled, and of adapters the strength and
        whom they are for: equal when the weights are."""
        # There the VAE makes latents of images before it is asked to decode any.
        vae = (self.vae_file,) if self.takes_last_image else ()
        alone = (*self.dits, self.text_encoder, self.tokenizer, self.image_encoder, *vae)
        files: list[tuple] = [(path, 1.0) for path in alone if path]
        files += [(one.path, one.strength, one.expert) for one in (*self.t3_weights, *self.loras)]
        if folder := self.folder_now:
            parts = ["transformer*", "text_encoder", "image_encoder", *(["vae"] if self.takes_last_image else [])]
            files += [(path, 1.0) for part in parts for path in sorted(folder.glob(f"{part}/*.safetensors"))]
            files += [(path, 1.0) for path in sorted(folder.glob("tokenizer/*")) if path.is_file()]
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns, *how] for path, *how in files]

    def describe(self) -> list[str]:
        """What would be loaded, a line each."""
        if self.embedded:
            lines = [f"embedded model in {self.folder}"]
        elif self.hub_id:
            lines = [f"{self.hub_id} from the hub ({'in the local cache' if self.folder else 'to be downloaded'})"]
        else:
            lines = [f"diffusers folder {self.folder}"] if self.folder else []
        named = [*(("DiT", path) for path in self.dits), ("VAE", self.vae_file), ("text encoder", self.text_encoder)]
        named += [("tokenizer", self.tokenizer), ("image encoder", self.image_encoder)]
        lines += [f"{what} {path}" for what, path in named if path]
        lines += [f"T3 weights {adapter.describe()}" for adapter in self.t3_weights]
        return [*lines, *(f"LoRA {adapter.describe()}" for adapter in self.loras), *self.notes]


def find_sources(
    *,
    model: str | None = None,
    dit: Sequence[str] = (),
    vae: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    image_encoder: str | None = None,
    t3_weights: Sequence[str] = (),
    loras: Sequence[str] = (),
    expert_loras: Sequence[Sequence[str]] = ((), ()),
) -> Sources:
    """Find and check everything that the arguments name, reading headers and configs only.

    `model` is a diffusers folder or hub id; single files take the place of its parts, or make a model of their own.
    `dit`: one file, or two for Wan2.2 A14B (high noise first). `t3_weights`: a full checkpoint, diff or LoRA, one for
    each expert. `loras`: `FILE` or `FILE:STRENGTH`; `expert_loras`: those for A14B's high-noise expert alone, and for
    its low-noise one. Nothing at all means the embedded model.
    Raises `T3Error` for what is missing, broken, or of the wrong kind.
    """
    if len(dit) > 2:
        raise T3Error(f"{len(dit)} --dit files were given; give one, or two for Wan2.2 A14B (high noise first).")
    single = {"--dit": dit, "--vae": vae, "--text-encoder": text_encoder}
    if model is None and any(single.values()):
        missing = [option for option, value in single.items() if not value]
        if missing:
            raise T3Error(f"without --model, {' and '.join(missing)} must be given too.")
    base = _base(model, has_files=any(single.values()))
    dits = tuple(existing(path, "--dit") for path in dit)
    if dits:
        base.update(_from_dits(dits))
    if vae:
        found = _identify(existing(vae, "--vae"), "vae", "--vae")
        base.update(vae=found.config, vae_file=Path(vae))
    if text_encoder:
        _identify(existing(text_encoder, "--text-encoder"), "text-encoder", "--text-encoder")
        base["text_encoder"] = Path(text_encoder)
    for option, value in (("tokenizer", tokenizer), ("image_encoder", image_encoder)):
        if value:
            base[option] = existing(value, f"--{option.replace('_', '-')}")
    return _finish(base, t3_weights, loras, expert_loras)


def find_merge(base: str | Path, t3_weights: Sequence[str] = (), loras: Sequence[str] = ()) -> Sources:
    """As `find_sources`, for files that are to be written into one whole transformer of any kind, run here or not.

    Files at strength 0 change nothing, so the plan they carry is left aside.
    Raises `T3Error` where `base` is no whole transformer whose numbers can be read, or a file does not fit it.
    """
    path = Path(base)
    file = open_weights(path)
    found = identify(file)
    if file.container != "safetensors" and not found.problem:
        raise T3Error(
            f"BASE {path} is a {file.container.upper()} file, whose quantised tensors are not read here. Merge into "
            "the bf16, fp16 or scaled-fp8 version of these weights and quantise the result, or load the GGUF file in "
            "ComfyUI, where T3 LoRA Retrofit Loader puts the same weights on it."
        )
    if found.form not in ("full", "unknown") or found.component not in ("dit", "unknown"):
        raise T3Error(
            f"BASE {path} is a {found.component}, {found.form}; T3 weights and LoRAs are merged into a whole "
            "transformer. An adapter is applied as it is, or merged as --t3-weights or --lora."
        )
    if found.problem:
        raise T3Error(f"BASE: {found.problem}")
    config = found.config
    assert config is not None
    tuned = tuple(open_adapter(text, "--t3-weights", config, anywhere=True) for text in t3_weights)
    others = tuple(open_adapter(text, "--lora", config, anywhere=True) for text in loras)
    carried: dict[str, Any] = carried_plan(_in_force(tuned), _in_force(others), [found.plan])
    vae = {"z_dim": config["out_channels"]}
    return Sources(found.model, config, vae, dits=(path,), t3_weights=tuned, loras=others, **carried)


def _in_force(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Those that change anything: what is at strength 0 says nothing of the weights that run."""
    return [adapter for adapter in adapters if adapter.strength]


def _finish(
    base: dict[str, Any], t3_weights: Sequence[str], loras: Sequence[str], expert_loras: Sequence[Sequence[str]]
) -> Sources:
    transformer, vae = base["transformer"], base["vae"]
    if transformer["out_channels"] != vae["z_dim"]:
        raise T3Error(
            f"the DiT makes latents of {transformer['out_channels']} channels and the VAE decodes {vae['z_dim']}. "
            "Wan2.1 and A14B go with the 16-channel VAE (wan_2.1_vae), Wan2.2 5B with the 48-channel one (wan2.2_vae)."
        )
    experts = base.get("experts", 1)
    if len(t3_weights) > experts:
        raise T3Error(f"{len(t3_weights)} --t3-weights files were given for {experts} transformer(s).")
    tuned_files = tuple(open_adapter(text, "--t3-weights", transformer) for text in t3_weights)
    lora_files = tuple(open_adapter(text, "--lora", transformer) for text in loras)
    for expert, (name, texts) in enumerate(zip(EXPERTS, expert_loras, strict=True)):
        if texts and experts < 2:
            raise T3Error(f"--lora-{name} is for one of two experts, and {base['name']} is one model: use --lora.")
        lora_files += tuple(replace(open_adapter(text, f"--lora-{name}", transformer), expert=expert) for text in texts)
    carried = carried_plan(_in_force(tuned_files), _in_force(lora_files), base.pop("plans", []))
    base.update(carried)
    return Sources(
        **base,
        t3_weights=tuned_files,
        loras=lora_files,
        tuned="yes" if carried else "cannot tell",
    )


def _base(model: str | None, *, has_files: bool) -> dict[str, Any]:
    if model is None:
        return {} if has_files else _from_embedded()
    path = Path(model)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        raise T3Error(f"--model {model} is a file; give single files as --dit, --vae and --text-encoder.")
    if not _HUB_ID.fullmatch(model):
        raise T3Error(f"--model {model}: no such folder, and not a hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers.")
    return _from_hub(model)


def _from_embedded() -> dict[str, Any]:
    from .embedded import embedded_folder

    return {**_from_folder(embedded_folder()), "name": "embedded", "embedded": True}


def _from_hub(hub_id: str) -> dict[str, Any]:
    cached = _cached(hub_id)
    if cached:
        try:
            return {**_from_folder(cached), "hub_id": hub_id, "name": hub_id}
        except T3Error as error:
            # A download that was interrupted is taken up again once there is work to do.
            if hub_id not in HUB:
                raise T3Error(f"{error} If its download was interrupted: hf download {hub_id}.") from None
    if hub_id not in HUB:
        raise T3Error(
            f"{hub_id} is not in the local cache and not one of the ids known here ({', '.join(HUB)}). "
            f"Download it first (hf download {hub_id}) and run again."
        )
    name, vae = HUB[hub_id]
    base: dict[str, Any] = {"name": name, "hub_id": hub_id, "transformer": known_config(name), "vae": known_config(vae)}
    if "a14b" in name:
        base.update(experts=2, boundary=BOUNDARY["i2v" in name])
    return base


def _cached(hub_id: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    index = try_to_load_from_cache(hub_id, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def _from_folder(folder: Path) -> dict[str, Any]:
    index = _read_json(folder / "model_index.json", f"{folder} is not a diffusers model folder")
    parts = [part for part in ("transformer", "transformer_2") if (folder / part / "config.json").exists()]
    if not parts:
        raise T3Error(f"{folder} has no transformer/config.json; it is not a Wan pipeline in diffusers' layout.")
    config = _read_json(folder / parts[0] / "config.json", f"{folder} is not complete")
    if config.get("_class_name") not in ("WanTransformer3DModel", "WanVACETransformer3DModel", None):
        raise T3Error(
            f"{folder} holds a {config['_class_name']}; T3 runs on pipelines with a WanTransformer3DModel or a "
            "WanVACETransformer3DModel."
        )
    for key in ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size"):
        if key not in config:
            raise T3Error(f"{folder / parts[0] / 'config.json'} lacks {key!r}; the folder is damaged.")
    vae = _read_json(folder / "vae" / "config.json", f"{folder} is not complete")
    # Configs written before these fields existed leave them out; they mean the Wan2.1 VAE.
    vae = {**known_config("wan2.1-vae"), **vae}
    return {
        "name": folder.name,
        "folder": folder,
        "plans": [_plan_in(folder / part) for part in parts],
        "transformer": config,
        "vae": vae,
        "experts": len(parts),
        "boundary": index.get("boundary_ratio"),
    }


def _plan_in(folder: Path) -> str | None:
    """The plan that a folder's weights carry. Weights that are not there are for the loader to miss."""
    if not any(folder.glob("*.safetensors")):
        return None
    file = open_weights(folder)
    plan = read_metadata(file.metadata, file.path).plan
    return plan.to_json() if plan else None


def _from_dits(dits: Sequence[Path]) -> dict[str, Any]:
    identities = [_identify(path, "dit", "--dit") for path in dits]
    configs = [identity.config for identity in identities]
    if any(config != configs[0] for config in configs):
        raise T3Error(
            f"the two --dit files differ in shape ({identities[0].model}, {identities[1].model}): they are no experts "
            "of one model."
        )
    config = configs[0]
    assert config is not None
    is_i2v = config["in_channels"] > config["out_channels"]
    return {
        "name": identities[0].model,
        "transformer": config,
        "dits": tuple(dits),
        "plans": [identity.plan for identity in identities],
        "experts": len(dits),
        "boundary": BOUNDARY[is_i2v] if len(dits) == 2 else None,
        "notes": tuple(note for one in identities if one.strange_config for note in one.notes),
    }


def _identify(path: Path, component: str, option: str) -> Identity:
    found = identify(open_weights(path))
    require(found, component, option)
    return found


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise T3Error(f"{otherwise}: {path.name} is missing from {path.parent}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise T3Error(f"{path} is not JSON ({error}); the folder is damaged.") from None
    if not isinstance(content, dict):
        raise T3Error(f"{path} does not hold a JSON object; the folder is damaged.")
    return content
