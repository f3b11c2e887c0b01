"""`python -m t3.convert`: the same weights under other names, metadata kept, whole files or none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weights_fixtures import one_thread, original_state, save, tiny_transformer, write_header  # noqa: F401
from weights_kinds import DIALECTS, adapter, by_hand, full_tensors, kind_names, kind_state

from t3 import convert
from t3.embedded_files import _sentencepiece
from t3.plan import Plan
from t3.weights import identify, open_weights
from t3.weights.adapters import apply_piece
from t3.weights.layout_text import text_layout
from t3.weights.respell import respell
from t3.weights.spelling import dialect_of
from t3.weights.tokenizer import EMBEDDED
from t3.weights.write import write_safetensors

PLAN = Plan.preset("wan2.1-4k").to_json()
METADATA = {"t3.plan": PLAN, "ss_network_dim": "4"}


def run(capsys, *arguments):
    status = convert.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("form", ["lora", "lora alpha", "dora", "loha", "lokr", "lokr factored", "set", "mixed"])
def test_adapters_mean_the_same(tmp_path, form, to):
    """From one dialect to every other: every parameter changes as by the old file, and the new one reads as its own."""
    kind = {"mixed": "vace", "dora": "fun-control", "lokr factored": "fun-camera"}.get(form, "i2v")
    state = kind_state(kind)
    for source in ("kohya", "diffusers"):
        tensors, deltas = adapter(kind, form, source)
        file = open_weights(save(tmp_path / "old.safetensors", tensors, METADATA))
        out = respell(file, identify(file), dialect_of(to))
        path = write_safetensors(tmp_path / f"{source}.safetensors", out.entries, out.metadata)
        new = open_weights(path)
        found = identify(new)
        assert found.problem is None and found.dialect == to and not out.dropped
        assert new.metadata == METADATA and found.plan == PLAN
        want = by_hand(state, deltas, 1.5)
        assert sorted({piece.target for piece in found.adapter.pieces}) == sorted(deltas)
        for piece in found.adapter.pieces:
            have = apply_piece(new, piece, state[piece.target].double(), 1.5)
            torch.testing.assert_close(have, want[piece.target], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["i2v", "vace", "fun-control", "fun-camera"])
def test_there_and_back_is_bit_identical(tmp_path, capsys, kind):
    state = kind_state(kind)
    first = save(tmp_path / "a.safetensors", full_tensors(kind, "original", state), METADATA)
    for to, want in (("diffusers", kind_names(kind)), ("comfyui", None), ("diffsynth", None), ("original", None)):
        out = tmp_path / f"{to}.safetensors"
        status, text, _ = run(capsys, first, "--to", to, "--out", out, "--json")
        assert status == 0 and json.loads(text)["dialect"] == {"from": identify(open_weights(first)).dialect, "to": to}
        assert want is None or set(load_file(out)) == set(want.values())
        first = out
    back = load_file(first)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert open_weights(first).metadata == METADATA


def test_a_lora_there_and_back_keeps_its_bytes(tmp_path, capsys):
    tensors, _ = adapter("t2v", "lora alpha", "kohya")
    first = save(tmp_path / "a.safetensors", {name: t.bfloat16() for name, t in tensors.items()})
    for to in ("comfyui", "original", "kohya"):
        assert run(capsys, first, "--to", to, "--out", tmp_path / f"{to}.safetensors")[0] == 0
        first = tmp_path / f"{to}.safetensors"
    back = load_file(first)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k].bfloat16()) for k in tensors)


def test_scales_are_folded_where_a_dialect_has_no_alpha(tmp_path):
    stem = "lora_unet_blocks_0_self_attn_q"
    for alpha, dtype in ((1.0, torch.bfloat16), (3.0, torch.float32)):  # a quarter is exact in any format
        up = torch.randn(128, 4).bfloat16()
        tensors = {f"{stem}.lora_down.weight": torch.randn(4, 128).bfloat16(), f"{stem}.lora_up.weight": up}
        file = open_weights(save(tmp_path / "a.safetensors", {**tensors, f"{stem}.alpha": torch.tensor(alpha)}))
        out = respell(file, identify(file), dialect_of("peft"))
        new = load_file(write_safetensors(tmp_path / "b.safetensors", out.entries, {}, overwrite=True))
        scaled = new["base_model.model.blocks.0.self_attn.q.lora_B.weight"]
        assert scaled.dtype == dtype and torch.equal(scaled.float(), up.float() * (alpha / 4)) and len(new) == 2
        assert "peft has no alpha: 1 scales are folded" in out.notes[0]


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_lengths_of_columns_stay_lengths_of_columns(tmp_path, to):
    """PEFT's DoRA has lengths of rows alone: under its name they would be taken for those."""
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 128), f"{stem}.lora_up.weight": torch.ones(128, 4)}
    file = open_weights(save(tmp_path / "a.safetensors", tensors | {f"{stem}.dora_scale": torch.rand(1, 128)}))
    (entry,) = (e for e in respell(file, identify(file), dialect_of(to)).entries if "dora_scale" in e.name)
    assert entry.shape == (1, 128)


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_a_scale_is_folded_into_one_factor(tmp_path, to):
    """Of a LoKr whose first factor is a product and whose second is whole."""
    stem, state = "diffusion_model.blocks.0.self_attn.q", kind_state("t2v")["blocks.0.self_attn.q.weight"]
    sizes = {"w1_a": (4, 2), "w1_b": (2, 4), "w2": (32, 32)}
    tensors = {f"{stem}.lokr_{role}": torch.randn(size) for role, size in sizes.items()}
    file = open_weights(save(tmp_path / "a.safetensors", tensors | {f"{stem}.alpha": torch.tensor(3.0)}))
    out = respell(file, identify(file), dialect_of(to))
    new = open_weights(write_safetensors(tmp_path / "b.safetensors", out.entries, out.metadata))
    have, want = (apply_piece(f, identify(f).adapter.pieces[0], state) for f in (new, file))
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize(("to", "count"), [("comfyui", 0), ("peft", 5), ("kohya", 2)])
def test_names_that_only_we_read_are_told(tmp_path, to, count):
    tensors, _ = adapter("t2v", "mixed", "original")
    file = open_weights(save(tmp_path / "a.safetensors", tensors))
    notes = [note for note in respell(file, identify(file), dialect_of(to)).notes if "other programs may not" in note]
    assert [int(note.split()[0]) for note in notes] == ([count] if count else [])


def test_settings_of_diffusers_become_an_alpha(tmp_path):
    """Kept in the metadata they would scale the new file twice."""
    stem = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 128), f"{stem}.lora_B.weight": torch.ones(128, 4)}
    tensors[f"{stem}.lora_B.bias"] = torch.ones(128)
    settings = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    file = open_weights(save(tmp_path / "a.safetensors", tensors, settings))
    out = respell(file, identify(file), dialect_of("comfyui"))
    new = load_file(write_safetensors(tmp_path / "b.safetensors", out.entries, out.metadata))
    stem = "diffusion_model.blocks.0.self_attn.q"
    assert (
        out.metadata == {} and new[f"{stem}.alpha"] == 8 and torch.equal(new[f"{stem}.diff_b"], torch.full((128,), 2.0))
    )


def test_scaled_fp8_models_keep_their_scales(tmp_path):
    state = original_state(tiny_transformer())
    name = "blocks.0.ffn.0"
    state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)
    extra = {f"{name}.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    notes = {"_quantization_metadata": json.dumps({"layers": {name: {"format": "float8_e4m3fn"}}})}
    file = open_weights(save(tmp_path / "a.safetensors", state | extra, notes))
    out = respell(file, identify(file), dialect_of("comfyui"))
    new = open_weights(write_safetensors(tmp_path / "b.safetensors", out.entries, out.metadata))
    prefix = "model.diffusion_model."
    assert identify(new).problem is None and f"{prefix}scaled_fp8" in new and not out.dropped
    assert list(json.loads(new.metadata["_quantization_metadata"])["layers"]) == [prefix + name]
    assert torch.equal(new.read(f"{prefix}{name}.weight"), file.read(f"{name}.weight"))


@pytest.mark.parametrize("scaled", [True, False])
def test_the_marks_of_other_parts_are_left_out(tmp_path, capsys, scaled):
    """A bundle's text encoder in scaled fp8 has a mark and layers of its own, which say nothing of the transformer."""
    prefix, other, name = "model.diffusion_model.", "text_encoders.umt5xxl.transformer.", "blocks.0.ffn.0"
    tensors = full_tensors("t2v", "comfyui", kind_state("t2v"))
    mark, layer = torch.zeros(2).to(torch.float8_e4m3fn), {"format": "float8_e4m3fn"}
    layers = {f"{other}x": layer}
    tensors |= {f"{other}x.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), f"{other}x.scale_weight": torch.ones(1)}
    tensors[f"{other}scaled_fp8"] = mark
    if scaled:
        tensors[f"{prefix}{name}.weight"] = tensors[f"{prefix}{name}.weight"].to(torch.float8_e4m3fn)
        tensors |= {f"{prefix}{name}.scale_weight": torch.ones(1), f"{prefix}scaled_fp8": mark}
        layers[prefix + name] = layer
    path = save(tmp_path / "a.safetensors", tensors, {"_quantization_metadata": json.dumps({"layers": layers})})
    for to, module in (("original", name), ("diffusers", "blocks.0.ffn.net.0.proj")):
        out = tmp_path / f"{to}.safetensors"
        status, _, err = run(capsys, path, "--to", to, "--out", out)
        assert status == 0 and f"left out   {other}scaled_fp8" in err
        new = open_weights(out)
        assert set(new.companions()) == ({f"{module}.scale_weight", "scaled_fp8"} if scaled else set())
        listed = json.loads(new.metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        assert list(listed) == ([module] if scaled else [])


@pytest.mark.parametrize("where", ["te", "te/tokenizer", "tokenizer", "inside", None])
def test_text_encoders_for_comfyui_hold_their_tokenizer(tmp_path, capsys, where):
    """Without it ComfyUI opens none."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 300}
    layout = text_layout({**sizes, "relative_attention_num_buckets": 32})
    tensors = {name: torch.zeros(param.shape) for name, param in layout.items()}
    pieces = _sentencepiece(["<pad>", "</s>", "<unk>", "a" * 200, "b"])
    if where == "inside":
        tensors[EMBEDDED] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    elif where:
        (tmp_path / where).mkdir(parents=True)
        (tmp_path / where / "spiece.model").write_bytes(pieces)
    (tmp_path / "te").mkdir(exist_ok=True)
    path, out = save(tmp_path / "te" / "a.safetensors", tensors), tmp_path / "b.safetensors"
    status, text, err = run(capsys, path, "--to", "comfyui", "--out", out, "--json")
    assert status == 0 and "left out" not in err and identify(open_weights(out)).problem is None
    new = load_file(out)
    if where:
        assert bytes(new[EMBEDDED].tolist()) == pieces and "WARNING" not in text
        assert ("spiece.model is inside" in text) == (where != "inside")
    else:
        assert EMBEDDED not in new and "ComfyUI cannot use this file" in text and "google/umt5-xxl" in text


@pytest.mark.parametrize("content", ["pointer", "cut", "larger"])
def test_what_is_no_tokenizer_of_it_is_not_put_in(tmp_path, capsys, content):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 4}
    layout = text_layout({**sizes, "relative_attention_num_buckets": 32})
    path = save(tmp_path / "a.safetensors", {name: torch.zeros(param.shape) for name, param in layout.items()})
    pieces = _sentencepiece(["<pad>", "</s>", "<unk>", "a", "b"])
    wrong = {"pointer": b"version https://git-lfs", "cut": pieces[:20], "larger": pieces}[content]
    (tmp_path / "spiece.model").write_bytes(wrong)
    status, _, err = run(capsys, path, "--to", "comfyui", "--out", tmp_path / "b.safetensors")
    want = "has 5 pieces, and the text encoder 4" if content == "larger" else "is no SentencePiece model"
    assert status == 2 and want in err and not (tmp_path / "b.safetensors").exists()


def test_what_a_bundle_holds_beside_is_left_out_and_named(tmp_path, capsys):
    tensors = full_tensors("t2v", "comfyui", kind_state("t2v")) | {"vae.conv1.weight": torch.ones(2)}
    path = save(tmp_path / "a.safetensors", tensors)
    status, _, err = run(capsys, path, "--to", "original", "--out", tmp_path / "b.safetensors")
    assert status == 0 and "left out   vae.conv1.weight" in err
    assert load_file(tmp_path / "b.safetensors").keys() == kind_state("t2v").keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "kohya", "--out", "new.safetensors"], "kohya has no names for a whole dit.*original, comfyui"),
        (["--to", "peft", "--out", "new.safetensors"], "holds an adapter_config.json"),
        (["--to", "comfyui", "--out", "new.ckpt"], "must end in .safetensors"),
        (["--to", "comfyui", "--out", "old.safetensors"], "exists already"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "old.safetensors", kind_state("t2v"))
    (tmp_path / "adapter_config.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, "old.safetensors", *arguments)
    assert status == 2 and not out
    assert re.search(message, err), err
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_cannot_be_placed_are_not_converted(tmp_path, capsys):
    path = save(tmp_path / "a.safetensors", {"lora_unet_down_blocks_1.lora_up.weight": torch.ones(2, 2)})
    status, _, err = run(capsys, path, "--to", "comfyui", "--out", tmp_path / "b.safetensors")
    assert status == 2 and "no parameter of a Wan transformer" in err and not (tmp_path / "b.safetensors").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process as Linux tells it")
def test_memory_is_for_one_tensor(tmp_path):
    """A LoRA of 350 MB, of holes, through a process of its own."""
    lora = {}
    for name in (f"lora_unet_blocks_{i}_self_attn_{part}" for i in range(30) for part in "qk"):
        lora |= {f"{name}.lora_down.weight": (1024, 1536), f"{name}.lora_up.weight": (1536, 1024)}
    path = write_header(tmp_path / "a.safetensors", lora)
    assert path.stat().st_size > 350e6
    code = (
        "from t3 import convert\n"
        f"status = convert.main([{str(path)!r}, '--to', 'comfyui', '--out', {str(tmp_path / 'b.safetensors')!r}])\n"
        "print(status, [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, peak = map(int, done.stdout.split())
    assert status == 0 and peak < 100_000  # KiB
