"""Small random models of every kind the headless engine runs, as diffusers folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from t3.embedded import TEXT_ENCODER, TRANSFORMER, byte_tokenizer
from t3.weights import known_config

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 56}


def _transformer(seed: int, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    cls = WanVACETransformer3DModel if "vace_layers" in changes else WanTransformer3DModel
    return cls(**{**TRANSFORMER, "num_layers": 2, **changes}).eval()


def _vae(name: str) -> AutoencoderKLWan:
    torch.manual_seed(5)
    config = {key: value for key, value in known_config(name).items() if not key.startswith("_")}
    narrow = {"base_dim": 8, "decoder_base_dim": 8 if config["decoder_base_dim"] else None}
    return AutoencoderKLWan(**{**config, **narrow}).eval()


def build(kind: str, folder: Path) -> Path:
    """Write a model of `kind` to `folder`, in diffusers' layout: t2v, i2v, vace, these as a14b-, or ti2v-5b."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(6)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER)).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "vae": _vae("wan2.2-vae" if kind == "ti2v-5b" else "wan2.1-vae"),
    }
    changes = {}
    if kind == "ti2v-5b":
        changes = {"in_channels": 48, "out_channels": 48}
        parts["expand_timesteps"] = True
    if kind.endswith("i2v"):
        changes = {"in_channels": 36}
    if kind == "i2v":
        changes.update(image_dim=CLIP["hidden_size"], added_kv_proj_dim=256)
        parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
        parts["image_processor"] = CLIPImageProcessor()
    if kind.endswith("vace"):
        changes = {"num_layers": 4, "vace_layers": [0, 2]}
    if kind.startswith("a14b"):
        parts.update(transformer_2=_transformer(8, **changes), boundary_ratio=0.875)
    parts["transformer"] = _transformer(7, **changes)
    pipeline = {"i2v": WanImageToVideoPipeline, "vace": WanVACEPipeline}.get(kind.rpartition("-")[2], WanPipeline)
    pipeline(**parts).save_pretrained(folder)
    return folder
