"""Recognising full-size models from headers alone: sparse files of their true sizes, with no data."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from t3.plan import Plan
from t3.weights import identify, known_config, open_weights
from t3.weights.layout_vae import vae_layout
from tests.weights_fixtures import (
    names_for,
    one_thread,  # noqa: F401
    original_state,
    save,
    tiny_transformer,
    write_header,
)

PLAN = Plan.preset("wan2.1-4k").to_json()
# Sizes as the model cards and the original configs state them.
DITS = {
    "wan2.1-t2v-1.3b": {"dim": 1536, "ffn": 8960, "layers": 30, "into": 16, "out": 16},
    "wan2.1-t2v-14b": {"dim": 5120, "ffn": 13824, "layers": 40, "into": 16, "out": 16},
    "wan2.1-i2v-14b": {"dim": 5120, "ffn": 13824, "layers": 40, "into": 36, "out": 16, "image": 1280},
    "wan2.1-flf2v-14b": {
        "dim": 5120,
        "ffn": 13824,
        "layers": 40,
        "into": 36,
        "out": 16,
        "image": 1280,
        "positions": 514,
    },
    "wan2.2-ti2v-5b": {"dim": 3072, "ffn": 14336, "layers": 30, "into": 48, "out": 48},
    "wan2.2-i2v-a14b": {"dim": 5120, "ffn": 13824, "layers": 40, "into": 36, "out": 16},
}
PARAMETERS = {"wan2.1-t2v-1.3b": 1.419e9, "wan2.1-t2v-14b": 14.29e9, "wan2.2-ti2v-5b": 5.0e9}


def dit_shapes(name):
    """Original name -> shape of a full-size model, measured on diffusers' own class."""
    size = DITS[name]
    config = {
        "num_attention_heads": size["dim"] // 128,
        "ffn_dim": size["ffn"],
        "num_layers": size["layers"],
        "in_channels": size["into"],
        "out_channels": size["out"],
        "image_dim": size.get("image"),
        "added_kv_proj_dim": size["dim"] if "image" in size else None,
        "pos_embed_seq_len": size.get("positions"),
    }
    with torch.device("meta"):
        state = WanTransformer3DModel(**config).state_dict()
    present = {key: value for key, value in config.items() if value is not None}
    return {original: tuple(state[theirs].shape) for original, theirs in names_for(present).items()}, config


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DITS)
def test_transformers(tmp_path, name, prefix):
    shapes, config = dit_shapes(name)
    path = write_header(tmp_path / "w.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    found = identify(open_weights(path))
    assert (found.component, found.form, found.model, found.problem) == ("dit", "full", name, None)
    assert len(found.matched) == len(shapes) and not found.unused and not found.refused
    assert found.config == known_config(name) and config.items() <= found.config.items()
    assert (found.plan, found.tuned, found.width) == (None, "cannot tell", DITS[name]["dim"])
    count = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    assert abs(count / PARAMETERS.get(name, count) - 1) < 0.01


SIZES = {"1.3b": (1536, 8960, 30), "5b": (3072, 14336, 30), "14b": (5120, 13824, 40)}
# name: size, channels in and out, whether it has the image branch, what is added
VARIANTS = {
    "wan2.1-vace-1.3b": ("1.3b", 16, 16, False, "vace"),
    "wan2.1-vace-14b": ("14b", 16, 16, False, "vace"),
    "wan2.1-fun-inp-1.3b": ("1.3b", 36, 16, True, ""),
    "wan2.1-fun-control-1.3b": ("1.3b", 48, 16, True, ""),
    "wan2.1-fun-control-14b": ("14b", 48, 16, True, "ref"),
    "wan2.1-fun-camera-1.3b": ("1.3b", 32, 16, True, "camera"),
    "wan2.2-fun-control-a14b": ("14b", 52, 16, False, "ref"),
    "wan2.2-fun-camera-a14b": ("14b", 36, 16, False, "camera"),
    "wan2.2-fun-inp-5b": ("5b", 100, 48, False, ""),
    "wan2.2-fun-control-5b": ("5b", 148, 48, False, "ref"),
}


def variant_shapes(size, into, out, image, part):
    """A published control variant: the plain model's shapes, and what VideoX-Fun and Wan's VACE add to them."""
    dim, ffn, layers = SIZES[size]
    config = {"num_attention_heads": dim // 128, "ffn_dim": ffn, "num_layers": layers}
    config |= {"in_channels": into, "out_channels": out}
    config |= {"image_dim": 1280, "added_kv_proj_dim": dim} if image else {}
    with torch.device("meta"):
        state = WanTransformer3DModel(**config).state_dict()
    shapes = {original: tuple(state[theirs].shape) for original, theirs in names_for(config).items()}
    block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    added = {}
    if part == "vace":
        added = {"vace_patch_embedding.weight": (dim, 96, 1, 2, 2), "vace_patch_embedding.bias": (dim,)}
        for i in range(15 if size == "1.3b" else 8):
            added |= {name.replace("blocks.0.", f"vace_blocks.{i}."): shape for name, shape in block.items()}
            for linear in ("before_proj", "after_proj") if i == 0 else ("after_proj",):
                added |= {f"vace_blocks.{i}.{linear}.weight": (dim, dim), f"vace_blocks.{i}.{linear}.bias": (dim,)}
    if part == "ref":
        added = {"ref_conv.weight": (dim, out, 2, 2), "ref_conv.bias": (dim,)}
    if part == "camera":
        added = {"control_adapter.conv.weight": (dim, 1536, 2, 2), "control_adapter.conv.bias": (dim,)}
        for conv in ("conv1", "conv2"):
            stem = f"control_adapter.residual_blocks.0.{conv}"
            added |= {f"{stem}.weight": (dim, dim, 3, 3), f"{stem}.bias": (dim,)}
    return shapes | added


@pytest.mark.parametrize("name", VARIANTS)
def test_control_variants(tmp_path, name):
    shapes = variant_shapes(*VARIANTS[name])
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", shapes)))
    assert (found.model, found.problem, found.refused) == (name, None, {}) and len(found.matched) == len(shapes)
    assert found.kind == ("i2v" if "inp" in name else name.split("-", 1)[1].rsplit("-", 1)[0])
    assert (found.elsewhere is None) == (found.kind in ("i2v", "vace"))
    assert "look alike" in found.describe() or "a14b" not in name


def test_an_expert_of_a14b_cannot_be_told_from_14b(tmp_path):
    path = write_header(tmp_path / "w.safetensors", dit_shapes("wan2.1-t2v-14b")[0])
    text = identify(open_weights(path)).describe()
    assert text.startswith("wan2.1-t2v-14b or a wan2.2-t2v-a14b expert: dit, full, original names; 1095 keys matched")


def test_diffusers_names_with_a_norm_nobody_uses(tmp_path):
    shapes, _ = dit_shapes("wan2.1-i2v-14b")
    renamed = {names_for({"num_layers": 40, "image_dim": 1})[key]: shape for key, shape in shapes.items()}
    renamed["blocks.3.attn2.norm_added_q.weight"] = (5120,)
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", renamed)))
    assert (found.model, found.dialect, found.problem) == ("wan2.1-i2v-14b", "diffusers", None)
    assert found.unused == ["blocks.3.attn2.norm_added_q.weight"]


@pytest.mark.parametrize("name", ["wan2.1-vae", "wan2.2-vae"])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_vaes(tmp_path, name, naming):
    config = known_config(name)
    with torch.device("meta"):
        state = AutoencoderKLWan(**config).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if naming == "original":
        shapes = {key: shapes[param.name] for key, param in vae_layout(config).items()}
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", shapes, dtype="F32")))
    assert (found.component, found.model, found.dialect, found.problem) == ("vae", name, naming, None)
    assert found.config == config and len(found.matched) == len(shapes)


def test_text_encoder_of_comfyui(tmp_path):
    with torch.device("meta"):
        state = UMT5EncoderModel(UMT5Config(**known_config("umt5-xxl"))).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    shapes |= {"spiece_model": (4_548_313,), "scaled_fp8": (0,)}
    shapes |= {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": ()}
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", shapes)))
    assert (found.component, found.model, found.problem) == ("text-encoder", "umt5-xxl", None)
    assert len(found.unused) == 4 and found.config == known_config("umt5-xxl")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("casual_audio_encoder.encoder.final_linear.weight", "wan-s2v"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "wan-humo"),
        ("patch_embedding_pose.weight", "wan-scail"),
    ],
)
def test_relatives_are_named_and_refused(tmp_path, key, family):
    shapes = {**dit_shapes("wan2.1-t2v-1.3b")[0], key: (4,)}
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", shapes)))
    assert found.model == family and list(found.refused) == [key]
    assert "use it in ComfyUI" in found.problem and "cannot be used" in found.describe()


@pytest.mark.parametrize(
    ("width", "part", "model"),
    [
        (1536, "self_attn.q", "wan2.1-t2v-1.3b"),
        (3072, "cross_attn.o", "wan2.2-ti2v-5b"),
        (5120, "ffn.2", "wan-14b"),
        (5120, "cross_attn.v_img", "wan2.1-i2v-14b"),
        (640, "self_attn.k", "custom"),
    ],
)
def test_adapters_by_width(tmp_path, width, part, model):
    stem = f"diffusion_model.blocks.3.{part}"
    shapes = {f"{stem}.lora_A.weight": (8, width), f"{stem}.lora_B.weight": (width, 8)}
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", shapes, metadata={"t3.plan": PLAN})))
    assert (found.model, found.form, found.width, found.problem) == (model, "lora", width, None)
    assert (found.plan, found.tuned) == (PLAN, "yes")


def test_parts_are_counted(tmp_path):
    state = original_state(tiny_transformer())
    state.pop("head.modulation")
    found = identify(open_weights(save(tmp_path / "w.safetensors", {**state, "what.is.this": torch.ones(1)})))
    assert list(found.refused) == ["what.is.this"] and len(found.matched) == len(state)
    assert "'head.modulation' is missing" in found.problem


def test_quantised_without_a_scale(tmp_path):
    state = original_state(tiny_transformer())
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(torch.int8)
    found = identify(open_weights(save(tmp_path / "w.safetensors", state)))
    assert "'blocks.0.ffn.0.weight' (I8)" in found.problem


def test_all_in_one_checkpoints(tmp_path):
    tensors = {f"model.diffusion_model.{key}": value for key, value in original_state(tiny_transformer()).items()}
    extra = {"text_encoders.umt5xxl.transformer.shared.weight": torch.ones(2), "vae.conv1.weight": torch.ones(2)}
    found = identify(open_weights(save(tmp_path / "w.safetensors", tensors | extra)))
    assert found.problem is None and found.component == "dit" and sorted(found.unused) == sorted(extra)
    found = identify(open_weights(save(tmp_path / "w.safetensors", tensors | {"stray.weight": torch.ones(2)})))
    assert list(found.refused) == ["stray.weight"] and "'stray.weight'" in found.problem


def test_no_torch_is_needed(tmp_path):
    full = write_header(tmp_path / "w.safetensors", dit_shapes("wan2.2-ti2v-5b")[0])
    stem = "diffusion_model.blocks.3.self_attn.q"
    shapes = {f"{stem}.lora_down.weight": (8, 1536), f"{stem}.lora_up.weight": (1536, 8), f"{stem}.alpha": ()}
    lora = write_header(tmp_path / "l.safetensors", shapes)
    code = (
        "import sys, json; from t3.weights import identify, open_weights\n"
        f"found = [identify(open_weights(path)).model for path in {[str(full), str(lora)]!r}]\n"
        "print(json.dumps([found, [m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [["wan2.2-ti2v-5b", "wan2.1-t2v-1.3b"], []]
