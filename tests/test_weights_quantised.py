"""Whole models in formats that only ComfyUI reads: known from the header, and refused before any work starts."""

import json

import pytest
import torch
from test_weights_gguf import model_file
from test_weights_text import ORIGINAL, SIZES
from transformers import UMT5Config, UMT5EncoderModel
from weights_fixtures import one_thread, original_state, save, tiny_transformer  # noqa: F401
from weights_kinds import adapter, kind_state

from t3 import convert, extract, inspect
from t3.adapters import open_adapter
from t3.errors import T3Error
from t3.weights import apply_weights, identify, load_text_encoder, load_transformer, open_weights
from t3.weights.respell import respell
from t3.weights.spelling import dialect_of
from t3.weights.write import write_safetensors

FORMATS = ["int8_tensorwise", "mxfp8", "block scales", "undeclared int8", "listed int8"]


def quantised(path, form, state):
    """A model's block matrices in a format, as ComfyUI's tools write them."""
    stored, layers = {}, {}
    for name, tensor in state.items():
        stored[name] = tensor
        if not (name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2):
            continue
        stem = name.removesuffix(".weight")
        int8 = "int8" in form
        stored[name] = (tensor * 100).to(torch.int8 if int8 else torch.float8_e4m3fn)
        blocks = torch.full((tensor.shape[0], tensor.shape[1] // 32), 127, dtype=torch.uint8)
        stored[f"{stem}.weight_scale"] = torch.tensor(0.01) if int8 else blocks
        if form == "block scales":
            stored[f"{stem}.weight_scale"] = blocks.float()
        layers[stem] = {"format": {"mxfp8": "mxfp8", "block scales": "float8_e4m3fn"}.get(form, "int8_tensorwise")}
        if form in ("int8_tensorwise", "mxfp8", "block scales"):
            note = json.dumps(layers[stem]).encode()
            stored[f"{stem}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    listed = {"_quantization_metadata": json.dumps({"layers": layers})} if form == "listed int8" else None
    return save(path, stored, listed)


@pytest.mark.parametrize("form", FORMATS)
def test_known_from_the_header_and_refused_before_work(tmp_path, capsys, form):
    plain = save(tmp_path / "plain.safetensors", kind_state("t2v"))
    path = quantised(tmp_path / "q.safetensors", form, kind_state("t2v"))
    found = identify(open_weights(path))
    assert found.problem is None and "20 tensors are not read here" in found.quantised == found.elsewhere
    assert "load the file in ComfyUI" in found.elsewhere
    assert inspect.main([str(path), "--json"]) == 0  # ComfyUI runs it
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and not facts["headless"] and facts["elsewhere"] == found.elsewhere
    with pytest.raises(T3Error, match="are not read here"):
        load_transformer(path, dtype=torch.float32)
    with pytest.raises(T3Error, match="are not read here"):
        apply_weights(tiny_transformer(), open_weights(path))
    config = identify(open_weights(plain)).config
    for anywhere in (False, True):
        with pytest.raises(T3Error, match="are not read here"):
            open_adapter(str(path), "--t3-weights", config, anywhere=anywhere)
    lora = save(tmp_path / "lora.safetensors", adapter("t2v", "lora", "peft")[0])
    out = tmp_path / "new" / "out.safetensors"
    for command in (
        lambda: convert.main([str(path), "--lora", str(lora), "--out", str(out)]),
        lambda: convert.main([str(plain), "--t3-weights", str(path), "--out", str(out)]),
        lambda: extract.main([str(plain), str(path), "--out", str(out), "--dry-run"]),
        lambda: extract.main([str(path), str(plain), "--out", str(out), "--dry-run"]),
    ):
        assert command() == 2 and "are not read here" in capsys.readouterr().err
        assert not out.parent.exists()


def test_scaled_fp8_is_read(tmp_path):
    state = kind_state("t2v")
    name = "blocks.0.ffn.0"
    for scale in (torch.tensor(0.5), torch.rand(320), torch.rand(320, 1).bfloat16()):
        scaled = {
            f"{name}.weight": state[f"{name}.weight"].to(torch.float8_e5m2),
            f"{name}.weight_scale": scale,
        }
        found = identify(open_weights(save(tmp_path / "a.safetensors", state | scaled)))
        assert found.quantised is found.elsewhere is found.problem is None


def test_names_can_be_changed_all_the_same(tmp_path):
    """Values are copied bit for bit, so nothing has to be read."""
    file = open_weights(quantised(tmp_path / "q.safetensors", "mxfp8", kind_state("t2v")))
    out = respell(file, identify(file), dialect_of("comfyui"))
    new = open_weights(write_safetensors(tmp_path / "new.safetensors", out.entries, out.metadata))
    assert identify(new).problem is None and len(new) == len(file) and not out.dropped
    for key in file:
        assert b"".join(file.pieces(key)) == b"".join(new.pieces(f"model.diffusion_model.{key}"))


def test_a_damaged_note_is_a_problem(tmp_path):
    state = kind_state("t2v")
    name = "blocks.0.ffn.0"
    state |= {f"{name}.weight": state[f"{name}.weight"].to(torch.float8_e4m3fn), f"{name}.weight_scale": torch.ones(1)}
    state[f"{name}.comfy_quant"] = torch.tensor(list(b"{"), dtype=torch.uint8)
    found = identify(open_weights(save(tmp_path / "a.safetensors", state)))
    assert "the quantisation note of 'blocks.0.ffn.0.weight' cannot be read" in found.problem


@pytest.mark.parametrize("anywhere", [False, True])
def test_a_quantised_gguf_is_no_t3_weights(tmp_path, anywhere):
    path, state = model_file(tmp_path)
    config = identify(open_weights(save(tmp_path / "plain.safetensors", state))).config
    with pytest.raises(T3Error, match=r"is quantised as Q8_0.*load the file in ComfyUI"):
        open_adapter(str(path), "--t3-weights", config, anywhere=anywhere)


def test_fun_models_are_merged_and_extracted_as_before(tmp_path):
    """They do not run here for another reason, which is none to refuse them as weights."""
    path = save(tmp_path / "a.safetensors", kind_state("fun-control"))
    found = identify(open_weights(path))
    assert found.elsewhere and found.quantised is None
    assert open_adapter(str(path), "--t3-weights", found.config, anywhere=True).strength == 1
    both = identify(open_weights(quantised(tmp_path / "q.safetensors", "mxfp8", kind_state("fun-control"))))
    assert "takes a control video" in both.elsewhere and "are not read here" in both.elsewhere


def test_a_quantised_text_encoder(tmp_path):
    state = UMT5EncoderModel(UMT5Config(**SIZES)).state_dict()
    state.pop("encoder.embed_tokens.weight")
    name = f"encoder.block.0.{next(iter(n for n in ORIGINAL if n.endswith('wo')))}"
    state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.int8)
    state[f"{name}.weight_scale"] = torch.tensor(1.0)
    path = save(tmp_path / "a.safetensors", state)
    with pytest.raises(T3Error, match="1 tensors are not read here"):
        load_text_encoder(path, dtype=torch.float32)
