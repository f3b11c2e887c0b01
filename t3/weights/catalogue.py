"""The models we know by name: their configs in `t3/configs`, and what to call them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..errors import T3Error
from .dialects import DIT, TEXT, VAE
from .layout_dit import width

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = {
    DIT: (
        "wan2.1-t2v-1.3b",
        "wan2.1-t2v-14b",
        "wan2.1-i2v-14b",
        "wan2.1-flf2v-14b",
        "wan2.2-ti2v-5b",
        "wan2.2-t2v-a14b",
        "wan2.2-i2v-a14b",
        "wan2.1-vace-1.3b",
        "wan2.1-vace-14b",
    ),
    VAE: ("wan2.1-vae", "wan2.2-vae"),
    TEXT: ("umt5-xxl",),
}
# Same shapes, different weights: the file cannot tell which it is.
ALSO = {
    "wan2.1-t2v-14b": "wan2.2-t2v-a14b expert",
    "wan2.1-i2v-14b": "Wan2.1-Fun 14B InP",
    "wan2.1-vace-14b": "Wan2.2 VACE-Fun A14B expert",
}
CANNOT_TELL = {
    "wan2.1-t2v-14b": "if it is A14B: high- and low-noise expert look alike",
    "wan2.2-i2v-a14b": "high- and low-noise expert (and Wan2.2-Fun A14B InP) look alike",
    "wan2.1-vace-14b": "if it is A14B: high- and low-noise expert look alike",
    "wan2.2-fun-control-a14b": "high- and low-noise expert look alike",
    "wan2.2-fun-camera-a14b": "high- and low-noise expert look alike",
    "wan-14b": "made for 14B or for an A14B expert: they have the same shapes",
}
WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}
_SIZES = {(1536, 8960, 30): "1.3b", (3072, 14336, 30): "5b", (5120, 13824, 40): "14b"}
PLAIN_KINDS = ("t2v", "i2v", "flf2v", "ti2v", "unknown")
HEADLESS_KINDS = (*PLAIN_KINDS, "vace")  # what the headless engine runs: diffusers has no class for the others
# A key under one of these says that the transformer has parts of a family that is known by name only.
OTHER_FAMILIES = {
    "casual_audio_encoder.": "wan-s2v",
    "audio_proj.": "wan-humo",
    "face_adapter.": "wan-animate",
    "patch_embedding_pose.": "wan-scail",
    "patch_embedding_global.": "wan-dancer",
}
LATENT_KEYS = ("latents_mean", "latents_std")


@functools.cache
def _text_of(name: str) -> str:
    return (CONFIGS / f"{name}.json").read_text(encoding="utf-8")


def known_config(name: str) -> dict[str, Any]:
    """The shipped config of a known model. Raises T3Error for any other name."""
    if not any(name in names for names in NAMES.values()):
        every = ", ".join(sorted(name for names in NAMES.values() for name in names))
        raise T3Error(f"No config for {name!r}; known are {every}.")
    return json.loads(_text_of(name))


def name_of(component: str, config: dict[str, Any]) -> str | None:
    """The known model that has this config (latent statistics aside), or None."""
    for name in NAMES[component]:
        known = known_config(name)
        if all(known.get(key) == value for key, value in config.items() if key not in LATENT_KEYS):
            return name
    return None


def kind_of(config: dict[str, Any]) -> str:
    """What a transformer of this config makes of what: "t2v", "i2v", "vace", ...; "unknown" when channels fit none."""
    into, out = config["in_channels"], config["out_channels"]
    if "vace_layers" in config:
        return "vace"
    if "camera_channels" in config:
        return "fun-camera"
    # Noise, a control video and an image; Wan2.2's image brings its mask of four channels.
    if "ref_conv_channels" in config or into in (3 * out, 3 * out + 4):
        return "fun-control"
    if config.get("pos_embed_seq_len") is not None:
        return "flf2v"
    if into == out:
        return "ti2v" if out == 48 else "t2v"
    return "i2v" if into == 2 * out + 4 else "unknown"


def not_headless(kind: str) -> str:
    """Why a kind of model is none of `HEADLESS_KINDS`, where it runs, and what can be done with it headless."""
    takes = {"fun-control": "a control video", "fun-camera": "a camera path"}.get(kind)
    why = f"It takes {takes}, which the headless engine has no way to give" if takes else "It does not run headless"
    return (
        f"{why}; use it in ComfyUI, where T3's nodes run it and put T3 weights and LoRAs on it. To have them in one "
        "file, merge them (python -m t3.convert BASE --t3-weights FILE --lora FILE --out MERGED.safetensors) and open "
        "the merged file in ComfyUI."
    )


def transformer_name(config: dict[str, Any]) -> str:
    """What to call a transformer: a known model, or "custom", or "wan-vace" and the like for other sizes."""
    if known := name_of(DIT, config):
        return known
    kind, size = kind_of(config), _SIZES.get((width(config), config["ffn_dim"], config["num_layers"]))
    usual = config["text_dim"] == 4096 and config["freq_dim"] == 256
    if kind in PLAIN_KINDS and not (usual and size in ("1.3b", "5b") and kind == "i2v"):
        return "custom"
    if size is None or not usual:
        return f"wan-{kind}"
    newer = size == "5b" or (size == "14b" and kind.startswith("fun-") and config.get("image_dim") is None)
    kind = "fun-inp" if kind == "i2v" else kind
    return f"wan2.2-{kind}-{size.replace('14b', 'a14b')}" if newer else f"wan2.1-{kind}-{size}"


def family_of(keys: list[str]) -> str | None:
    """Name of a Wan relative (S2V, HuMo, Animate, ...) whose extra parts are among these prefix-less keys."""
    return next((name for start, name in OTHER_FAMILIES.items() if any(key.startswith(start) for key in keys)), None)


def name_of_width(width: int | None) -> str:
    """How messages speak of a model this wide: "1536 wide (Wan2.1 1.3B)"."""
    known = WIDTHS.get(width or 0)
    return f"{width} wide" + (f" ({known})" if known else "")


def latent_statistics(z_dim: int) -> dict[str, list[float]]:
    """Latent mean and std of the known VAE with this many latent channels; empty when there is none."""
    for name in NAMES[VAE]:
        config = known_config(name)
        if config["z_dim"] == z_dim:
            return {key: config[key] for key in LATENT_KEYS}
    return {}
