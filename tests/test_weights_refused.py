"""Files that must not be applied: each is refused with its reason, and the model stays bit for bit the same."""

import pytest
import torch

from t3.errors import T3Error
from t3.weights import apply_weights, identify, open_weights
from tests.weights_fixtures import (
    TINY,
    TINY_I2V,
    one_thread,  # noqa: F401
    original_state,
    save,
    tiny_transformer,
    write_header,
)


def pair(module, rows=128, columns=128, rank=2, value=0.1):
    return {
        f"{module}.lora_A.weight": torch.full((rank, columns), value),
        f"{module}.lora_B.weight": torch.full((rows, rank), value),
    }


GOOD = pair("diffusion_model.blocks.0.self_attn.q")
NAN, INF = float("nan"), float("inf")
SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
# name: tensors beside one good pair, words of the message
CASES = {
    "SDXL": (
        {f"{SDXL}.lora_down.weight": torch.ones(2, 640), f"{SDXL}.alpha": torch.tensor(2.0)},
        "no parameter of a Wan",
    ),
    "another family": (pair("transformer.transformer_blocks.0.attn1.to_q"), "transformer_blocks"),
    "text encoder": (pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "text encoder"),
    "text encoder of diffusers": (pair("text_encoder.layers.0.q"), "text encoder"),
    "unet prefix": (pair("unet.blocks.0.self_attn.q"), r"unet\.blocks"),
    "unknown block part": (pair("diffusion_model.blocks.0.self_attn.z"), "self_attn.z"),
    "vace block": (pair("diffusion_model.vace_blocks.0.self_attn.q"), "vace_blocks"),
    "deeper model": (pair("diffusion_model.blocks.7.self_attn.q"), "2 blocks, the LoRA goes to 8"),
    "image part": (pair("diffusion_model.blocks.0.cross_attn.k_img"), "k_img"),
    "half a LoKr": ({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(2, 2)}, "w1 with no w2_a and w2_b"),
    "half a LoHa": ({"diffusion_model.blocks.0.ffn.0.hada_w1_a": torch.ones(2, 2)}, "LoHa parts w1_a with no w1_b"),
    "LoHa of other ranks": (
        {
            f"diffusion_model.blocks.0.ffn.0.hada_{role}": torch.ones(shape)
            for role, shape in {"w1_a": (320, 2), "w1_b": (2, 128), "w2_a": (320, 3), "w2_b": (2, 128)}.items()
        },
        "do not make 'blocks.0.ffn.0.weight'",
    ),
    "LoKr of another size": (
        {
            "diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(4, 4),
            "diffusion_model.blocks.0.ffn.0.lokr_w2": torch.ones(80, 31),
        },
        "do not make 'blocks.0.ffn.0.weight'",
    ),
    "LoRA and LoKr": (
        {
            "diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(4, 4),
            "diffusion_model.blocks.0.self_attn.q.lokr_w2": torch.ones(32, 32),
        },
        "LoRA and LoKr of one module",
    ),
    "magnitude of another size": (
        {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(127, 1)},
        "do not make",
    ),
    "magnitude alone": ({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(320, 1)}, "A and B are missing"),
    "OFT": ({"diffusion_model.blocks.0.self_attn.q.oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
    "core": ({"diffusion_model.blocks.0.self_attn.q.lora_mid.weight": torch.ones(3, 3)}, "does not make"),
    "set": ({"diffusion_model.blocks.0.self_attn.q.set_weight": torch.ones(128, 127)}, r"\[128, 127\]"),
    "reshape": ({"diffusion_model.blocks.0.self_attn.q.reshape_weight": torch.ones(2)}, "reshape_weight"),
    "full tensor": ({"diffusion_model.blocks.0.self_attn.k.weight": torch.ones(128, 128)}, "full tensors inside"),
    "A without B": (
        {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 128)},
        r"no B \(up\).*blocks\.0\.ffn\.0",
    ),
    "B without A": ({"diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.ones(320, 2)}, r"no A \(down\)"),
    "alpha alone": ({"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(1.0)}, "A and B are missing"),
    "shape": (pair("diffusion_model.blocks.0.ffn.0", 320, 127), r"\[320, 2\] times A \[2, 127\].*\[320, 128\]"),
    "ranks differ": (
        {
            **pair("x"),
            "blocks.0.ffn.0.lora_A.weight": torch.ones(2, 128),
            "blocks.0.ffn.0.lora_B.weight": torch.ones(320, 3),
        },
        "no parameter",
    ),
    "ranks": (
        {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 128), "blocks.0.ffn.0.lora_B.weight": torch.ones(320, 3)},
        "does not make",
    ),
    "integers": ({"diffusion_model.blocks.0.ffn.0.diff": torch.ones(320, 128, dtype=torch.int8)}, "stored as I8"),
    "diff shape": ({"diffusion_model.blocks.0.norm3.diff": torch.ones(127)}, r"\[127\].*\[128\]"),
    "transposed diff": ({"diffusion_model.blocks.0.ffn.0.diff": torch.ones(128, 320)}, r"\[128, 320\].*\[320, 128\]"),
    "long alpha": ({**pair("blocks.0.ffn.0", 320), "blocks.0.ffn.0.alpha": torch.ones(2)}, "one number"),
    "NaN alpha": ({**pair("blocks.0.ffn.0", 320), "blocks.0.ffn.0.alpha": torch.tensor(NAN)}, "finite"),
    "NaN in A": (pair("diffusion_model.blocks.1.ffn.2", 128, 320, value=NAN), "not finite"),
    "inf in a diff": ({"diffusion_model.blocks.1.norm3.diff": torch.full((128,), INF)}, "not finite"),
    "product too large": (pair("diffusion_model.blocks.1.ffn.0", 320, value=1e30), "not finite"),
    "two adapters": (
        {"diffusion_model.blocks.0.self_attn.q.lora_A.other.weight": torch.ones(2, 128)},
        "second tensors",
    ),
    "two namings": (pair("diffusion_model.blocks.0.attn1.to_k"), "another naming"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_changes(tmp_path, name):
    more, message = CASES[name]
    model = tiny_transformer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = save(tmp_path / "a.safetensors", {**GOOD, **more})
    with pytest.raises(T3Error, match=message) as caught:
        apply_weights(model, open_weights(path))
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["NaN in A", "NaN alpha", "diff shape"])
def test_strength_zero_checks_too(tmp_path, name):
    path = save(tmp_path / "a.safetensors", {**GOOD, **CASES[name][0]})
    with pytest.raises(T3Error, match=CASES[name][1]):
        apply_weights(tiny_transformer(), open_weights(path), 0.0)


@pytest.mark.parametrize("name", ["SDXL", "another family", "text encoder", "unet prefix", "half a LoKr", "OFT"])
def test_nothing_matches(tmp_path, name):
    path = save(tmp_path / "a.safetensors", CASES[name][0])
    found = identify(open_weights(path))
    assert found.component == "unknown" and not found.matched and len(found.refused) == len(CASES[name][0])
    assert str(path) in found.problem
    with pytest.raises(T3Error):
        apply_weights(tiny_transformer(), open_weights(path))


def test_a_vace_part_without_its_model(tmp_path):
    path = save(tmp_path / "a.safetensors", {"vace_blocks.0.self_attn.q.weight": torch.ones(128, 128)})
    assert "the VACE part of a Wan model, without the model itself" in identify(open_weights(path)).problem


def test_sizes_are_named(tmp_path):
    wide = write_header(
        tmp_path / "a.safetensors",
        {"blocks.0.self_attn.q.lora_A.weight": (8, 3072), "blocks.0.self_attn.q.lora_B.weight": (3072, 8)},
    )
    with pytest.raises(T3Error, match=r"LoRA is for a model 3072 wide \(Wan2\.2 5B\).*loaded model is 128 wide"):
        apply_weights(tiny_transformer(), open_weights(wide))


def test_too_large_for_float16(tmp_path):
    model = tiny_transformer(dtype=torch.float16)
    path = save(tmp_path / "a.safetensors", {"blocks.0.norm3.diff": torch.full((128,), 7e4)})
    with pytest.raises(T3Error, match=r"torch\.float16"):
        apply_weights(model, open_weights(path))
    assert torch.isfinite(model.blocks[0].norm2.weight).all()


def full(model, config=TINY):
    return original_state(model, config)


def test_full_checkpoints_that_do_not_fit(tmp_path):
    model = tiny_transformer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = full(tiny_transformer(seed=1))
    lacking = {key: value for key, value in whole.items() if key != "blocks.1.ffn.2.bias"}
    broken = {**whole, "head.head.bias": torch.full((64,), NAN)}
    cases = {
        "lacking": (lacking, "incomplete.*blocks.1.ffn.2.bias"),
        "extra": ({**whole, "blocks.0.self_attn.extra": torch.ones(1)}, "blocks.0.self_attn.extra"),
        "nan": (broken, "head.head.bias.*not finite"),
        "image": (full(tiny_transformer(TINY_I2V), TINY_I2V), r"does not fit.*\[128, 36, 1, 2, 2\]"),
        "vae": ({"decoder.middle.0.residual.0.gamma": torch.ones(4, 1, 1, 1)}, "is a vae"),
    }
    for name, (tensors, message) in cases.items():
        path = save(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(T3Error, match=message):
            apply_weights(model, open_weights(path))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name


def test_a_model_that_is_not_plain(tmp_path):
    model = tiny_transformer()
    model.fuse_qkv_projections()
    path = save(tmp_path / "a.safetensors", GOOD)
    with pytest.raises(T3Error, match=r"before fusing.*to_qkv"):
        apply_weights(model, open_weights(path))
