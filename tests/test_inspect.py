"""`python -m t3.inspect`: what it says, in words and as JSON, and its exit status."""

import json
import subprocess
import sys

import pytest
import torch
from weights_fixtures import one_thread, original_state, save, tiny_transformer, write_header  # noqa: F401
from weights_kinds import DIALECTS, FORMS, adapter, full_tensors, kind_state

from t3 import inspect
from t3.plan import Grid, Plan
from t3.weights import T3Metadata
from t3.weights.layout_vae import vae_layout

PLAN = Plan("mine", Grid(2, 4, 6), ((1, 2, 3),))
SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def run(capsys, path, *options):
    status = inspect.main([str(path), *options])
    return status, capsys.readouterr().out


def look(capsys, path):
    """The JSON, which must agree with the words on the exit status."""
    status, out = run(capsys, path, "--json")
    facts = json.loads(out)
    words_status, words = run(capsys, path)
    assert words_status == status == (0 if facts["ok"] else 2)
    for name in ("form", "dialect", "model", "matched", "unused", "refused", "plan"):
        assert name in facts
    return facts, words


@pytest.mark.parametrize("form", FORMS)
def test_adapters(tmp_path, capsys, form):
    dialect = list(DIALECTS)[FORMS.index(form) % len(DIALECTS)]
    tensors, deltas = adapter("i2v", form, dialect)
    facts, words = look(capsys, save(tmp_path / "a.safetensors", tensors))
    assert facts["ok"] and facts["matched"] == len(tensors) and not facts["unused"] and not facts["refused"]
    assert facts["dialect"] == dialect and facts["parameters_changed"] == len(deltas)
    assert (facts["plan"], facts["tuned"]) == (None, "cannot tell")
    assert f"onto {len(deltas)} parameters" in words and "T3-tuned   cannot tell" in words


def test_t3_metadata(tmp_path, capsys):
    tensors, _ = adapter("t2v", "lora", "comfyui")
    path = save(tmp_path / "a.safetensors", tensors, T3Metadata(PLAN, rank=4, writer="x 1").to_header())
    facts, words = look(capsys, path)
    assert Plan.from_json(json.dumps(facts["plan"])) == PLAN
    assert (facts["tuned"], facts["rank"], facts["trained_grid"], facts["writer"]) == ("yes", 4, [2, 4, 6], "x 1")
    assert "T3-tuned   yes" in words and "plan 'mine'" in words


def test_whole_models(tmp_path, capsys):
    bundle = full_tensors("fun-control", "comfyui", kind_state("fun-control")) | {"vae.conv1.weight": torch.ones(2)}
    facts, words = look(capsys, save(tmp_path / "a.safetensors", bundle))
    assert (facts["form"], facts["dialect"]) == ("full", "comfyui")
    assert (facts["model"], facts["kind"]) == ("wan-fun-control", "fun-control")
    assert (facts["matched"], facts["unused"], facts["refused"]) == (len(bundle) - 1, 1, 0) and not facts["headless"]
    assert (
        "unused     vae.conv1.weight" in words and "headless   no" in words and "prefix model.diffusion_model." in words
    )
    path = save(tmp_path / "b.safetensors", original_state(tiny_transformer()))
    facts, words = look(capsys, path)
    assert facts["headless"] and facts["model"] == "custom" and "custom, 128 wide" in words


def test_a_vae_is_placed_too(tmp_path, capsys):
    from diffusers import AutoencoderKLWan

    config = dict(AutoencoderKLWan(base_dim=4, z_dim=16).config)
    shapes = {name: param.shape for name, param in vae_layout(config).items()}
    facts, _ = look(capsys, write_header(tmp_path / "vae.safetensors", shapes, dtype="F32"))
    assert facts["ok"] and facts["component"] == "vae" and facts["form"] == "full"


def test_every_key_without_a_place_is_named(tmp_path, capsys):
    good, _ = adapter("t2v", "lora", "comfyui")
    bad = {
        f"{SDXL}.lora_up.weight": "no parameter of a Wan transformer",
        "diffusion_model.blocks.0.self_attn.k.lora_A.weight": "no B (up)",
        "diffusion_model.blocks.0.self_attn.k.weight": "full tensors inside of an adapter file",
        "lora_te1_text_model.lora_up.weight": "for the text encoder",
        "diffusion_model.blocks.0.self_attn.v.oft_blocks": "OFT",
    }
    path = save(tmp_path / "a.safetensors", good | {key: torch.ones(2, 128) for key in bad})
    facts, words = look(capsys, path)
    assert not facts["ok"] and (facts["matched"], facts["refused"]) == (len(good), len(bad))
    for key, reason in bad.items():
        assert reason in facts["refused_keys"][key] and f"refused    {key}: " in words


@pytest.mark.parametrize("name", ["SDXL", "page", "truncated", "ten gigabytes", "missing"])
def test_what_cannot_be_used_ends_with_2_and_a_sentence(tmp_path, capsys, name):
    path = tmp_path / "a.safetensors"
    if name != "missing":
        save(path, {f"{SDXL}.lora_{part}.weight": torch.ones(2, 2) for part in ("up", "down")})
    if name == "page":
        path.write_bytes(b"<!DOCTYPE html><html></html>")
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    if name == "ten gigabytes":
        path.write_bytes((10 * 10**9).to_bytes(8, "little") + b"{}" * 20)
    facts, words = look(capsys, path)
    assert not facts["ok"] and facts["form"] == facts["model"] == "unknown" and facts["plan"] is None
    assert facts["refused"] == (2 if name == "SDXL" else 0)
    said = {
        "SDXL": "looks like a Stable Diffusion or SDXL file",
        "page": "web page",
        "truncated": "truncated",
        "ten gigabytes": "10,000,000,000",
        "missing": "does not exist",
    }
    assert said[name] in facts["problem"] and facts["problem"] in words


def test_a_bad_plan_is_told_beside_what_the_file_is(tmp_path, capsys):
    facts, words = look(capsys, save(tmp_path / "a.safetensors", adapter("t2v", "lora", "peft")[0], {"t3.plan": "{}"}))
    assert not facts["ok"] and (facts["form"], facts["dialect"], facts["plan"]) == ("lora", "peft", None)
    assert 'no "t3_plan" field' in facts["problem"] and "PROBLEM" in words


def test_no_torch_is_needed(tmp_path):
    tensors, _ = adapter("t2v", "lokr", "kohya")
    path = save(tmp_path / "a.safetensors", tensors)
    code = (
        f"import sys; from t3 import inspect; status = inspect.main([{str(path)!r}])\n"
        "print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "form       LoKr" in done.stdout
