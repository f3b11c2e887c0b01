"""The models we know by name: their configs in `t3/configs`, and what to call them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..errors import T3Error
from .dialects import DIT, TEXT, VAE

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
    ),
    VAE: ("wan2.1-vae", "wan2.2-vae"),
    TEXT: ("umt5-xxl",),
}
# Same shapes, different weights: the file cannot tell which it is.
ALSO = {"wan2.1-t2v-14b": "wan2.2-t2v-a14b expert"}
WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 5B", 5120: "Wan 14B"}
# A key under one of these says that the transformer has parts diffusers' WanTransformer3DModel does not.
OTHER_FAMILIES = {
    "vace_": "wan-vace",
    "control_adapter.": "wan-camera",
    "casual_audio_encoder.": "wan-s2v",
    "audio_proj.": "wan-humo",
    "face_adapter.": "wan-animate",
    "patch_embedding_pose.": "wan-scail",
    "patch_embedding_global.": "wan-dancer",
    "ref_conv.": "wan-fun-control",
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


def family_of(keys: list[str], width: int | None) -> str | None:
    """Name of a Wan relative (VACE, Camera, S2V, ...) whose extra parts are among these prefix-less keys."""
    family = next((name for start, name in OTHER_FAMILIES.items() if any(key.startswith(start) for key in keys)), None)
    if family == "wan-vace":
        size = {1536: "-1.3b", 5120: "-14b"}.get(width or 0, "")
        return family + size
    return family


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
