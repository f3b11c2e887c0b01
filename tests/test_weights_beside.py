"""JSON files beside the weights: settings of an adapter and a config of a model, their own, another's, or damaged."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from weights_fixtures import (
    TINY,
    TWO_HEADS,
    one_thread,  # noqa: F401
    original_state,
    randomise,
    save,
    tiny_transformer,
    write_header,
)
from weights_kinds import kind_state

from t3 import convert, inspect
from t3.errors import T3Error
from t3.sources import _from_dits
from t3.weights import identify, known_config, load_transformer, open_weights
from t3.weights.adapter_file import scale_of
from t3.weights.layout_vae import vae_layout

STEM = "base_model.model.blocks.0.self_attn.q"
PEFT = {f"{STEM}.lora_A.weight": torch.ones(4, 128), f"{STEM}.lora_B.weight": torch.ones(128, 4)}
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 32}


def scale(folder):
    file = open_weights(save(folder / "adapter_model.safetensors", PEFT))
    found = identify(file)
    return scale_of(file, found.adapter.pieces[0]), found.notes


def test_settings_with_a_mark_before_them_count(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8-sig")
    assert scale(tmp_path) == (8.0, [])


def test_without_settings_alpha_is_the_rank_and_told(tmp_path):
    assert scale(tmp_path) == (1.0, ["no adapter_config.json beside it: alpha taken to equal the rank"])


def test_settings_beside_files_of_other_programs_are_not_theirs(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    tensors = {key.replace("base_model.model.", "diffusion_model."): tensor for key, tensor in PEFT.items()}
    file = open_weights(save(tmp_path / "style.safetensors", tensors))
    assert scale_of(file, identify(file).adapter.pieces[0]) == 1.0


@pytest.mark.parametrize(
    "content", [json.dumps(SETTINGS)[:-5].encode(), b"", b"\xff\xfe{\x00", b"[1]", b'"x"', b"[" * 100_000, None]
)
def test_settings_that_cannot_be_read_are_no_guess(tmp_path, content, capsys):
    """Taken for none they would change the strength eightfold, in silence. None: a folder of that name."""
    if content is None:
        (tmp_path / "adapter_config.json").mkdir()
    else:
        (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(T3Error, match=r"scale is unknown.*adapter_config\.json cannot be read.*Download them again"):
        scale(tmp_path)
    assert inspect.main([str(tmp_path / "adapter_model.safetensors")]) == 2
    assert "its scale is unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": "high"}, {"lora_alpha": float("nan")}, {"lora_alpha": [8]}, {"alpha_pattern": [1]}]
)
def test_an_alpha_that_is_no_number(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    with pytest.raises(T3Error, match=r"adapter_config\.json has alpha .* at rank 4; an alpha is a finite number"):
        scale(tmp_path)


OTHERS = {
    "width": {"num_attention_heads": 4, "attention_head_dim": 128},
    "width by default": {"num_attention_heads": 4},
    "channels": {"num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 48},
    "layers": {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 40},
    "no numbers": {"num_attention_heads": "4", "attention_head_dim": 64},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_config_of_another_model_changes_nothing(tmp_path, other, capsys):
    """In a folder of single files: 4 heads of 64 also make 256, and compute something else."""
    state = original_state(tiny_transformer(TWO_HEADS), TWO_HEADS)
    path = save(tmp_path / "mine.safetensors", state)
    alone = identify(open_weights(path))
    beside = {"_class_name": "WanTransformer3DModel", "eps": 0.5, **OTHERS[other]}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    found = identify(open_weights(path))
    assert found.config == alone.config and found.problem is None
    assert [note for note in found.notes if "config.json beside it is of another model" in note]
    assert _from_dits([path])["notes"] == tuple(found.notes)
    # A copy of it beside a merged file would be of no use.
    diff = save(tmp_path / "diff.safetensors", {"blocks.0.self_attn.q.diff": torch.ones(256, 256)})
    out = tmp_path / "new" / "out.safetensors"
    assert convert.main([str(path), "--lora", str(diff), "--out", str(out)]) == 0
    assert "need a copy of it" not in capsys.readouterr().err


def test_a_config_of_its_own_counts_and_is_not_told(tmp_path):
    config = {**TINY, "num_attention_heads": 2, "attention_head_dim": 64, "eps": 0.25}
    library = tiny_transformer(config)
    library.save_pretrained(tmp_path)
    found = identify(open_weights(tmp_path))
    assert (found.config["num_attention_heads"], found.config["eps"], found.notes) == (2, 0.25, [])
    assert load_transformer(tmp_path, dtype=torch.float32).config.attention_head_dim == 64


def test_a_config_of_another_class_of_that_name_is_left_alone(tmp_path):
    """VideoX-Fun's, which has fields of its own: neither taken nor told."""
    path = save(tmp_path / "mine.safetensors", original_state(tiny_transformer()))
    alone = identify(open_weights(path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "dim": 128, "eps": 0.5}))
    found = identify(open_weights(path))
    assert found.config == alone.config and found.notes == alone.notes


@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "wan2.1-flf2v-14b", "wan2.2-ti2v-5b", "wan2.1-vace-14b"])
def test_the_published_configs_belong_to_their_models(tmp_path, model):
    from t3.weights.layout_dit import dit_layout

    config = known_config(model)
    shapes = {name: param.shape for name, param in dit_layout(config).items()}
    name = "WanVACETransformer3DModel" if "vace" in model else "WanTransformer3DModel"
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    found = identify(open_weights(write_header(tmp_path / "w.safetensors", shapes)))
    assert found.model == model and not any("config.json" in note for note in found.notes)


def test_a_config_of_another_vae_changes_nothing(tmp_path):
    config = dict(AutoencoderKLWan(base_dim=4, z_dim=16).config)
    shapes = {name: param.shape for name, param in vae_layout(config).items()}
    path = write_header(tmp_path / "vae.safetensors", shapes, dtype="F32")
    alone = identify(open_weights(path)).config
    beside = {"_class_name": "AutoencoderKLWan", "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    found = identify(open_weights(path))
    assert found.config == alone and "z_dim 4 where the tensors have 16" in found.describe()
    library = randomise(AutoencoderKLWan(base_dim=4, z_dim=16, latents_mean=[1.0] * 16, latents_std=[3.0] * 16))
    library.save_pretrained(tmp_path)
    found = identify(open_weights(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert found.config["latents_std"] == [3.0] * 16 and not found.notes


def test_a_config_that_cannot_be_read_is_told(tmp_path, capsys):
    path = save(tmp_path / "a.safetensors", kind_state("t2v"))
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "num_att')
    assert inspect.main([str(path)]) == 2
    assert "config.json cannot be read" in capsys.readouterr().out
    with pytest.raises(T3Error, match=r"Repair that file, or move it away"):
        load_transformer(path, dtype=torch.float32)
    # An adapter has no use for it.
    assert identify(open_weights(save(tmp_path / "b.safetensors", PEFT))).problem is None
