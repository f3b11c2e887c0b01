"""Small random models under the names the workflows ask for, built once into `.host/`; and workflows made small.

The files have the real formats, so that the ordinary loader nodes open them.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import host_comfy
import host_models
import torch
from install import FOLDER
from safetensors.torch import save_file
from small_models import build_like_embedded

from t3 import Plan
from t3.embedded_files import host_file
from t3.weights import T3Metadata
from t3.weights.fingerprint import fingerprint
from tools.notes import SMALL_FILES, STYLE_LORA, T3_LORA, TEXT_ENCODER, WAN14, WAN21, WAN22, File

TEXT_WIDTH = 768  # of the text encoder below
LAYERS = 2  # of the diffusion models
# Another number where a file changes, so that old ones are built anew.
VERSION = 2
WIDTH, HEIGHT, FRAMES, STEPS = 64, 64, 5, 2
BUILDERS: dict[File, Callable[[], tuple[dict[str, torch.Tensor], dict[str, str]]]] = {
    WAN21.dit: lambda: _dit("t2v"),
    WAN22.dit: lambda: _dit("ti2v-5b"),
    WAN14.dit: lambda: _dit("t2v", seed=14),
    T3_LORA: lambda: (_lora(20, "o", "modulation"), _t3_metadata()),
    STYLE_LORA: lambda: (_lora(30, "q", "v"), {}),
    TEXT_ENCODER: lambda: (_text_encoder(), {}),
    WAN21.vae: lambda: (_vae21(), {}),
    WAN22.vae: lambda: (_vae22(), {}),
    **{file: lambda part=part: _small(part) for part, file in SMALL_FILES.items()},
}


def folder() -> Path:
    """The folder of all stand-ins, as ComfyUI's `models`; those not there yet are built."""
    models = FOLDER / f"models-{VERSION}"
    paths = {file: models / file.folder / file.name for file in BUILDERS}
    missing = [file for file, path in paths.items() if not path.exists()]
    if missing:
        host_comfy.load()
    for file in missing:
        paths[file].parent.mkdir(parents=True, exist_ok=True)
        state, metadata = BUILDERS[file]()
        # Two test processes may build the same file: each a copy of its own, and the last one stays.
        unfinished = paths[file].with_suffix(f".{os.getpid()}.part")
        save_file(state, unfinished, metadata=metadata)
        unfinished.replace(paths[file])
    return models


def fit(graph: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow's API twin at a small size and with few steps; everything else as shipped."""
    graph = copy.deepcopy(dict(graph))
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
    return graph


SMALL: dict[str, dict[str, int]] = {
    "T3EmptyLatent": {"width": WIDTH, "height": HEIGHT, "frames": FRAMES},
    "ImageScale": {"width": WIDTH, "height": HEIGHT},
    "T3VAEEncode": {"length": FRAMES},
    "KSampler": {"steps": STEPS},
}


def _dit(kind: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    sizes = {"num_layers": LAYERS, "text_dim": TEXT_WIDTH}
    state = host_models.dit_state_dict(kind, seed=seed, **sizes)
    return {key: tensor.half() for key, tensor in state.items()}, host_models.metadata(TEXT_WIDTH)


def _lora(seed: int, *names: str) -> dict[str, torch.Tensor]:
    """A LoRA on these self-attention projections, or the difference of the modulation tables."""
    generator, width = torch.Generator().manual_seed(seed), host_models.SIZES["dim"]
    state = {}
    for block in (f"diffusion_model.blocks.{i}" for i in range(LAYERS)):
        for name in names:
            if name == "modulation":
                state[f"{block}.modulation.diff"] = 0.1 * torch.randn(1, 6, width, generator=generator)
                continue
            state[f"{block}.self_attn.{name}.lora_A.weight"] = torch.randn(4, width, generator=generator) / 16
            state[f"{block}.self_attn.{name}.lora_B.weight"] = torch.randn(width, 4, generator=generator) / 16
    return state


def _t3_metadata() -> dict[str, str]:
    base, _ = _dit("t2v", seed=14)
    mark = fingerprint("wan2.1-t2v-14b", base, base.__getitem__)
    return T3Metadata(plan=Plan.preset("wan2.1-4k"), base=mark, rank=4, writer="stand-in").to_header()


def _vae21() -> dict[str, torch.Tensor]:
    from comfy.ldm.wan.vae import WanVAE

    vae = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    return random_state(vae, 1)


def _vae22() -> dict[str, torch.Tensor]:
    """At its full size, which is fixed in ComfyUI: 1.4 GB."""
    from comfy.ldm.wan.vae2_2 import WanVAE

    with torch.device("meta"):
        vae = WanVAE(
            dim=160, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
        )
    return random_state(vae, 2)


def _small(part: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file of the embedded model's, but for the transformer's weights, which are random."""
    with tempfile.TemporaryDirectory() as folder:
        entries, metadata = host_file(build_like_embedded(Path(folder) / "model"), part)
        return {entry.name: entry.tensor().clone() for entry in entries}, metadata


def random_state(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random half-precision weights that keep the scale of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    # Drawing hundreds of millions of numbers takes long; the same million over and over will do.
    noise = torch.randn(1 << 20, generator=generator)
    state = {}
    for name, tensor in module.state_dict().items():
        count = tensor.numel()
        values = noise.repeat(-(-count // len(noise)))[:count].reshape(tensor.shape)
        if tensor.ndim > 1 and tensor.shape[1] > 1:
            values = values / (tensor[0].numel() ** 0.5)
        else:
            values = 0.1 * values + (1.0 if name.endswith(("gamma", "norm.weight")) else 0.0)
        state[name] = values.half()
    return state


def _text_encoder() -> dict[str, torch.Tensor]:
    """An encoder of T5-base's shape: the only small one that ComfyUI's loader takes for Wan."""
    from comfy.text_encoders import t5

    config = json.loads((Path(t5.__file__).parent / "t5_config_base.json").read_text())
    import comfy.ops

    with torch.device("meta"):
        model = t5.T5(config, torch.float16, "meta", comfy.ops.disable_weight_init)
    return random_state(model, 3)
