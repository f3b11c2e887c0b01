"""Loading transformers and VAEs from original and diffusers names: equal to the library's own models."""

import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from t3.errors import T3Error
from t3.weights import apply_weights, identify, load_transformer, load_vae, open_weights
from t3.weights.layout_vae import vae_layout
from tests.weights_fixtures import (
    TINY,
    TINY_FLF2V,
    TINY_I2V,
    TWO_HEADS,
    inputs,
    one_thread,  # noqa: F401
    original_state,
    randomise,
    save,
    tiny_transformer,
    write_header,
)

CONFIGS = {"t2v": TWO_HEADS, "i2v": TINY_I2V, "flf2v": TINY_FLF2V}
SPELLINGS = {
    "original": lambda model, config: original_state(model, config),
    "comfyui": lambda model, config: {
        f"model.diffusion_model.{k}": v for k, v in original_state(model, config).items()
    },
    "diffusers": lambda model, config: model.state_dict(),
}


def same_model(ours, library, config):
    """Same parameters and buffers, bit for bit and in the same dtypes; the same output up to rounding."""
    mine, theirs = dict(ours.named_parameters()), dict(library.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert mine[name].dtype == parameter.dtype and torch.equal(mine[name], parameter), name
    for (name, mine_buffer), (_, buffer) in zip(ours.named_buffers(), library.named_buffers(), strict=True):
        assert mine_buffer.dtype == buffer.dtype and torch.equal(mine_buffer, buffer), name
    feed = {k: v if k == "timestep" else v.to(ours.dtype) for k, v in inputs(config).items()}
    with torch.no_grad():
        # Not bit for bit: matrix products depend on how the operands lie in memory, and ours are mapped from a file.
        torch.testing.assert_close(ours(**feed).sample, library(**feed).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformer_equals_the_library(tmp_path, kind, spelling):
    config = CONFIGS[kind]
    library = tiny_transformer(config)
    path = save(tmp_path / "w.safetensors", SPELLINGS[spelling](library, config))
    found = identify(open_weights(path))
    assert (found.component, found.form, found.model, found.problem) == ("dit", "full", "custom", None)
    ours = load_transformer(path, dtype=torch.float32)
    assert not ours.training and all(not p.is_meta for p in ours.parameters())
    same_model(ours, library, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_equals_from_pretrained(tmp_path, dtype):
    """Including the parts that diffusers keeps in float32."""
    tiny_transformer(TWO_HEADS).save_pretrained(tmp_path / "library")
    library = WanTransformer3DModel.from_pretrained(tmp_path / "library", torch_dtype=dtype)
    path = save(tmp_path / "w.safetensors", original_state(tiny_transformer(TWO_HEADS), TWO_HEADS))
    for ours in (load_transformer(path, dtype=dtype), load_transformer(tmp_path / "library", dtype=dtype)):
        assert ours.blocks[0].scale_shift_table.dtype == torch.float32
        assert ours.blocks[0].attn1.to_q.weight.dtype == dtype
        assert dict(ours.config)["num_attention_heads"] == 2
        same_model(ours, library, TWO_HEADS)


def test_heads_that_are_not_128_wide(tmp_path):
    """Said by diffusers' config.json beside the file, or by ComfyUI's metadata inside of it."""
    config = {**TINY, "num_attention_heads": 2, "attention_head_dim": 64}
    library = tiny_transformer(config)
    library.save_pretrained(tmp_path / "library")
    same_model(load_transformer(tmp_path / "library", dtype=torch.float32), library, config)
    metadata = {"config": json.dumps({"transformer": {"num_heads": 2}})}
    path = save(tmp_path / "w.safetensors", original_state(library, config), metadata)
    same_model(load_transformer(path, dtype=torch.float32), library, config)
    narrow = {**TINY, "num_attention_heads": 1, "attention_head_dim": 96}
    path = save(tmp_path / "n.safetensors", original_state(tiny_transformer(narrow), narrow))
    with pytest.raises(T3Error, match="96 is no multiple of the head size 128"):
        load_transformer(path, dtype=torch.float32)


def test_scaled_fp8_transformer(tmp_path):
    state = original_state(tiny_transformer())
    stored, want = {}, dict(state)
    for name, tensor in state.items():
        stored[name] = tensor
        if name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2:
            stored[name] = (tensor / 0.01).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
            want[name] = stored[name].float() * 0.01
    stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    path = save(tmp_path / "w.safetensors", stored)
    found = identify(open_weights(path))
    assert found.problem is None and len(found.unused) == 1 + 20 and not found.refused
    after = original_state(load_transformer(path, dtype=torch.float32))
    assert all(torch.equal(after[name], tensor) for name, tensor in want.items())


def test_changing_a_loaded_model_leaves_its_file_alone(tmp_path):
    """Tensors are mapped from the file; applying weights in place must not write through."""
    path = save(tmp_path / "w.safetensors", original_state(tiny_transformer()))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    model = load_transformer(path, dtype=torch.float32)
    diff = save(tmp_path / "d.safetensors", {"blocks.0.self_attn.q.diff": torch.ones(128, 128)})
    apply_weights(model, open_weights(diff))
    want = original_state(tiny_transformer())["blocks.0.self_attn.q.weight"] + 1
    assert torch.equal(model.blocks[0].attn1.to_q.weight, want)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


VAES = {
    "2.1": {"base_dim": 8, "z_dim": 16},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("name", VAES)
def test_vae_equals_the_library(tmp_path, name, naming):
    library = randomise(AutoencoderKLWan(**VAES[name]), scale=0.1)
    state = library.state_dict()
    if naming == "original":
        state = {key: state[param.name] for key, param in vae_layout(dict(library.config)).items()}
    path = save(tmp_path / "w.safetensors", state)
    found = identify(open_weights(path))
    assert (found.component, found.model, found.dialect, found.problem) == ("vae", "custom", naming, None)
    ours = load_vae(path, dtype=torch.float32)
    assert ours.config.scale_factor_spatial == library.config.scale_factor_spatial
    assert len(ours.config.latents_mean) == len(ours.config.latents_std) == ours.config.z_dim
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = library.encode(video).latent_dist.mean
        torch.testing.assert_close(ours.encode(video).latent_dist.mean, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents).sample, library.decode(latents).sample, rtol=1e-5, atol=1e-5)


def test_vae_statistics_come_from_the_config_beside_it(tmp_path):
    library = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[1.0, 2, 3, 4], latents_std=[5.0, 6, 7, 8])
    library.save_pretrained(tmp_path)
    assert load_vae(tmp_path, dtype=torch.float32).config.latents_std == [5.0, 6, 7, 8]
    (tmp_path / "config.json").unlink()
    assert "taken as 0 and 1" in identify(open_weights(tmp_path)).describe()


def test_the_wrong_file_is_refused_before_tensors_are_read(tmp_path):
    """The data of these files is a hole: reading it would not fail, so only the names can have decided."""
    vae = {key: p.shape for key, p in vae_layout(dict(AutoencoderKLWan(base_dim=4, z_dim=16).config)).items()}
    write_header(tmp_path / "vae.safetensors", vae)
    write_header(tmp_path / "dit.safetensors", {k: v.shape for k, v in original_state(tiny_transformer()).items()})
    write_header(tmp_path / "lora.safetensors", {"blocks.0.ffn.0.diff": (320, 128)})
    write_header(tmp_path / "clip.safetensors", {"visual.transformer.resblocks.0.weight": (4, 4)})
    with pytest.raises(T3Error, match=r"vae\.safetensors.*is a vae.*not a dit.*--dit"):
        load_transformer(tmp_path / "vae.safetensors", dtype=torch.float32)
    with pytest.raises(T3Error, match=r"is a dit.*not a vae.*--vae"):
        load_vae(tmp_path / "dit.safetensors", dtype=torch.float32)
    with pytest.raises(T3Error, match=r"adapter \(diff\).*--lora"):
        load_transformer(tmp_path / "lora.safetensors", dtype=torch.float32)
    with pytest.raises(T3Error, match="CLIP"):
        load_transformer(tmp_path / "clip.safetensors", dtype=torch.float32)


def test_wrong_sizes_are_refused(tmp_path):
    shapes = {k: tuple(v.shape) for k, v in original_state(tiny_transformer()).items()}
    shapes["blocks.1.ffn.2.weight"] = (128, 321)
    write_header(tmp_path / "w.safetensors", shapes)
    with pytest.raises(T3Error, match=r"'blocks\.1\.ffn\.2\.weight' with \[128, 321\].*\[128, 320\]"):
        load_transformer(tmp_path / "w.safetensors", dtype=torch.float32)
