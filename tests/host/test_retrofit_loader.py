"""T3 LoRA Retrofit Loader as a user meets it: the plan that comes with a file, what is said, what is refused."""

from __future__ import annotations

import os
import re
import struct
import sys

import host_models
import pytest
import torch
from host_nodes import refusal, run
from host_runs import COUNTS, forward, plan_of, with_t3
from host_weights import SIZES, Folders, is_untouched, model, state
from weights_fixtures import one_thread as one_thread
from weights_kinds import adapter, by_hand, full_tensors

from t3 import Grid, Plan
from t3.weights import T3Metadata
from t3.weights.fingerprint import fingerprint

pytest_plugins = ["host_node_fixtures"]

PLAN = Plan("tuned", Grid(6, 6, 6), tuple(COUNTS))


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    return Folders(tmp_path, monkeypatch)


@pytest.fixture
def node(nodes):
    return nodes["T3RetrofitLoader"]


def base_of(tensors, name="wan2.1-t2v-1.3b"):
    return fingerprint(name, tensors, tensors.__getitem__)


def retrofit(files, name="t3.safetensors", plan=PLAN, base=None, seed=10):
    """A LoRA with diffs that says what it was tuned for; the file's entry, and what it adds."""
    tensors, deltas = adapter("t2v", "mixed", "comfyui", seed=seed, state=state("t2v"))
    base = base_of(state("t2v")) if base is None else base
    metadata = T3Metadata(plan=plan, base=base, rank=4, writer="test").to_header()
    return files.save(tensors, name, metadata), deltas


def windowed(patcher):
    return [key for key in patcher.object_patches if key.endswith(".self_attn.forward")]


def one_pass(patcher):
    x = torch.randn(1, 16, 6, 12, 12, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(2))
    return forward(patcher, x, text=text)


def by_hand_model(deltas):
    patcher = host_models.patcher("t2v", **SIZES)
    patcher.model.diffusion_model.load_state_dict(
        {name: tensor.float() for name, tensor in by_hand(state("t2v"), deltas, 1.0).items()}
    )
    return patcher


def test_the_plan_in_the_file_installs_itself(pack, files, node):
    """A forward pass is that of T3 Attention with this plan, on weights patched by hand."""
    file, deltas = retrofit(files)
    patched, report = run(node, model=model("t2v"), file=file)
    assert len(windowed(patched)) == 2
    assert "T3 attention with plan tuned, from the file" in report and "WARNING" not in report
    assert "T3-tuned: yes" in report and "Rank up to 4." in report and "Written by test." in report
    hand = by_hand_model(deltas)
    expected, dense = one_pass(with_t3(pack, hand, custom_plan=plan_of(pack))[0]), one_pass(hand)
    assert (one_pass(patched) - expected).norm() < 1e-4 * expected.norm()
    assert (expected - dense).norm() > 1e-2 * expected.norm()
    assert is_untouched("t2v")


def test_a_connected_plan_goes_first(pack, files, node):
    file, deltas = retrofit(files)
    layers = [[1, 2, 2], [2, 3, 1]]
    patched, report = run(node, model=model("t2v"), file=file, custom_plan=plan_of(pack, layers))
    assert "T3 attention with plan test, the connected one" in report
    expected = one_pass(with_t3(pack, by_hand_model(deltas), custom_plan=plan_of(pack, layers))[0])
    assert (one_pass(patched) - expected).norm() < 1e-4 * expected.norm()


def test_without_a_plan_attention_is_left_to_t3_attention(pack, files, node, nodes):
    tensors, deltas = adapter("t2v", "lora", "kohya", state=state("t2v"))
    file = files.save(tensors)
    patched, report = run(node, model=model("t2v"), file=file)
    assert not windowed(patched)
    assert "attention stays as it is. Put T3 Attention behind this node." in report
    assert "WARNING: no T3 metadata: cannot tell whether these weights are T3-tuned" in report
    # Before or behind T3 Attention, the same.
    behind = with_t3(pack, patched)[0]
    before, report = run(node, model=with_t3(pack, model("t2v"))[0], file=file)
    assert "T3 attention stays as it is, plan test." in report
    expected = one_pass(with_t3(pack, by_hand_model(deltas))[0])
    assert torch.equal(one_pass(behind), one_pass(before))
    assert (one_pass(before) - expected).norm() < 1e-4 * expected.norm()


def test_t3_attention_behind_it_takes_the_plan_of_the_weights(pack, files, node):
    file, _ = retrofit(files)
    patched, _ = run(node, model=model("t2v"), file=file)
    again, report = with_t3(pack, patched, custom_plan=None, dense_blocks="1")
    assert "Plan tuned (the plan of the weights)" in report and "cannot be told" not in report
    assert "Replaces the T3 attention of a node before it." in report
    assert (one_pass(again) - one_pass(patched)).norm() > 1e-3 * one_pass(patched).norm()
    _, report = with_t3(pack, patched, custom_plan=None, plan="wan2.1-4k")
    assert "tuned for plan tuned, another one" in report
    _, report = with_t3(pack, patched, custom_plan=None, plan="dense")
    assert "another one" not in report


def test_settings_of_t3_attention_before_it_stay(pack, files, node):
    before, _ = with_t3(pack, model("t2v"), dense_blocks="1", memory="lean")
    patched, report = run(node, model=before, file=retrofit(files)[0])
    settings = sys.modules[f"{pack.__name__}.nodes.patch"].settings_of(patched)
    assert (settings.plan.name, settings.memory, settings.dense_blocks) == ("tuned", "lean", {1})
    assert "Replaces the T3 attention of a node before it." in report


def test_two_files_with_different_plans_ask_for_a_choice(pack, files, node):
    one, _ = retrofit(files)
    same, _ = retrofit(files, "same.safetensors", seed=600)
    other, _ = retrofit(files, "other.safetensors", plan=Plan("other", Grid(6, 6, 6), ((1, 2, 2),)))
    first, _ = run(node, model=model("t2v"), file=one)
    run(node, model=first, file=same)
    with pytest.raises(ValueError, match=r"tuned for plan 'other', and those loaded before them for 'tuned'.*custom_p"):
        run(node, model=first, file=other)
    _, report = run(node, model=first, file=other, custom_plan=plan_of(pack))
    assert "plan test, the connected one" in report


def test_at_strength_0_another_plan_is_no_matter(pack, files, node):
    one, _ = retrofit(files)
    other, _ = retrofit(files, "other.safetensors", plan=Plan("other", Grid(6, 6, 6), ((1, 2, 2),)))
    first, _ = run(node, model=model("t2v"), file=one)
    second, report = run(node, model=first, file=other, strength=0.0)
    assert "At strength 0 nothing is done." in report
    assert torch.equal(one_pass(second), one_pass(first))
    assert "Plan tuned (the plan of the weights)" in with_t3(pack, second, custom_plan=None)[1]


def test_a_connected_plan_does_not_change_what_weights_are_tuned_for(pack, files, node):
    file, _ = retrofit(files)
    patched, report = run(node, model=model("t2v"), file=file, custom_plan=plan_of(pack))
    another = "The weights are tuned for plan tuned, another one: expect a worse picture, or noise."
    assert another in report
    _, report = with_t3(pack, patched, custom_plan=None)
    assert "Plan test (the plan connected to T3 LoRA Retrofit Loader)" in report and another in report
    of_the_file = sys.modules[f"{pack.__name__}.t3"].Plan("tuned", (6, 6, 6), tuple(COUNTS))
    _, report = with_t3(pack, patched, custom_plan=of_the_file)
    assert "Plan tuned (the connected plan)" in report and "another one" not in report
    _, report = run(node, model=model("t2v"), file=file, custom_plan=of_the_file)
    assert "the connected one" in report and "another one" not in report


def test_a_connected_plan_stays_chosen_for_further_files(pack, files, node):
    """For one of the same plan; one of another plan needs another choice."""
    first, _ = run(node, model=model("t2v"), file=retrofit(files)[0], custom_plan=plan_of(pack))
    same, _ = retrofit(files, "same.safetensors", seed=600)
    second, report = run(node, model=first, file=same)
    assert "T3 attention with plan test, the one connected to a node before" in report
    assert "tuned for plan tuned, another one" in report
    assert "Plan test (the plan connected" in with_t3(pack, second, custom_plan=None)[1]


def test_of_a_file_without_a_plan_a_connected_one_tells_nothing(pack, files, node):
    tensors, _ = adapter("t2v", "lora", "kohya", state=state("t2v"))
    patched, _ = run(node, model=model("t2v"), file=files.save(tensors), custom_plan=plan_of(pack))
    _, report = with_t3(pack, patched, custom_plan=None)
    assert "Plan test (the plan connected" in report
    assert "Whether these weights are T3-tuned cannot be told from the file" in report
    with pytest.raises(ValueError, match=r"tuned for plan 'tuned', and those loaded before them were given 'test'"):
        run(node, model=patched, file=retrofit(files)[0])
    # One that is tuned for just that plan goes with it.
    plan = sys.modules[f"{pack.__name__}.t3"].Plan.from_json(PLAN.to_json())
    chosen, _ = run(node, model=model("t2v"), file=files.save(tensors), custom_plan=plan)
    _, report = run(node, model=chosen, file=retrofit(files)[0])
    assert "T3 attention with plan tuned, from the file" in report


def test_another_base_is_warned_of(pack, files, node, caplog):
    """Also where patches are in place, or a LoRA before this node: the weights as loaded count."""
    other = {name: torch.randn_like(tensor) for name, tensor in state("t2v").items()}
    file, _ = retrofit(files, base=base_of(other))
    _, report = run(node, model=model("t2v"), file=file)
    assert "WARNING: made for another base (wan2.1-t2v-1.3b, 128 wide, 2 blocks) than the one loaded (custom" in report
    assert "made for another base" in caplog.text
    big, _ = adapter("t2v", "diff", "comfyui", state=state("t2v"))
    big = {name: 50 * tensor for name, tensor in big.items()}
    patched, _ = run(node, model=model("t2v"), file=files.save(big, "big.safetensors"))
    fitting, _ = retrofit(files, "fitting.safetensors")
    import comfy.model_management

    comfy.model_management.load_models_gpu([patched])
    for on in (patched, model("t2v")):
        assert "another base" not in run(node, model=on, file=fitting)[1]
    comfy.model_management.unload_all_models()
    # A whole checkpoint leaves nothing of the base, unless it goes only part of the way.
    metadata = T3Metadata(plan=PLAN, base=base_of(other)).to_header()
    whole = files.save(full_tensors("t2v", "original", state("t2v")), "whole.safetensors", metadata, "diffusion_models")
    assert "another base" not in run(node, model=model("t2v"), file=whole)[1]
    assert "another base" in run(node, model=model("t2v"), file=whole, strength=0.5)[1]


def test_at_strength_0_nothing_is_done(pack, files, node):
    patched, report = run(node, model=model("t2v"), file=retrofit(files)[0], strength=0.0)
    assert not patched.patches and not patched.object_patches and "At strength 0 nothing is done." in report


def test_the_file_is_listed_and_watched(pack, files, node):
    import folder_paths

    file, _ = retrofit(files)
    (files.base / "loras" / "old.ckpt").write_bytes(b"x")
    (files.base / "loras" / "sub").mkdir()
    deep, _ = retrofit(files, "sub/deep.safetensors")
    folder_paths.filename_list_cache.clear()
    (combo,) = [i for i in node.define_schema().inputs if i.id == "file"]
    assert sorted(combo.options) == sorted([file, deep])
    assert node.validate_inputs(file) is True and node.validate_inputs(None) is True
    before = node.fingerprint_inputs(file=file, strength=1.0, model=None)
    assert node.fingerprint_inputs(file=file) == before != node.fingerprint_inputs(file=deep)
    os.utime(files.base / "loras" / "t3.safetensors", ns=(1, 1))
    changed = node.fingerprint_inputs(file=file)
    assert changed != before
    (files.base / "loras" / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert node.fingerprint_inputs(file=file) != changed
    # Over a link any of them may be meant.
    linked = node.fingerprint_inputs(file=None)
    assert node.fingerprint_inputs(file=None) == linked
    os.utime(files.base / "loras" / "sub" / "deep.safetensors", ns=(1, 1))
    assert node.fingerprint_inputs(file=None) != linked


@pytest.mark.parametrize(
    "entry",
    [
        "no such.safetensors",
        "loras/gone.safetensors",
        "loras/../secret.safetensors",
        "loras//etc/passwd",
        "checkpoints/w.safetensors",
        "loras/pickle.pt",
        "",
    ],
)
def test_names_outside_of_the_list_are_refused(pack, files, node, entry):
    retrofit(files)
    (files.base / "secret.safetensors").write_bytes(b"x")
    (files.base / "loras" / "pickle.pt").write_bytes(b"x")
    files.entry("")
    sentence = refusal(node, model=model("t2v"), file=entry)
    assert "no .safetensors file in models/loras and models/diffusion_models; choose one of the list" in sentence


def raw(files, header, data=b""):
    header = header if isinstance(header, bytes) else header.encode()
    (files.base / "loras" / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return files.entry("w.safetensors")


def bytes_of(files, content):
    (files.base / "loras" / "w.safetensors").write_bytes(content)
    return files.entry("w.safetensors")


def for_a_5b(files):
    module = "diffusion_model.blocks.0.self_attn.q"
    return files.save({f"{module}.lora_A.weight": torch.ones(4, 3072), f"{module}.lora_B.weight": torch.ones(3072, 4)})


def sdxl(files):
    stem = "lora_unet_input_blocks_4_1_proj_in"
    return files.save({f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": torch.ones(8, 4)})


def truncated(files):
    entry, _ = retrofit(files, "w.safetensors")
    path = files.base / "loras" / "w.safetensors"
    return bytes_of(files, path.read_bytes()[:-100]) if entry else entry


def unknown_keys(files):
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state("t2v"))
    return files.save(tensors | {"diffusion_model.blocks.0.self_attn.z.lora_A.weight": torch.ones(4, 128)})


def deeper(files):
    """Fits in all but its last piece."""
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state("t2v"))
    last = "diffusion_model.blocks.7.ffn.0"
    return files.save(
        tensors | {f"{last}.lora_A.weight": torch.ones(4, 128), f"{last}.lora_B.weight": torch.ones(320, 4)}
    )


def not_finite(files, number=torch.nan):
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state("t2v"))
    tensors[max(tensors)] = torch.full_like(tensors[max(tensors)], number)
    return files.save(tensors)


def a_vae(files):
    return files.save({"decoder.middle.0.residual.0.gamma": torch.ones(8, 1, 1, 1), "conv1.weight": torch.ones(8)})


def of_another_kind(files):
    return files.save(full_tensors("i2v", "original", state("i2v")), folder="diffusion_models")


def newer_metadata(files):
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state("t2v"))
    return files.save(tensors, metadata={"t3.version": "9"})


ENTRY = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
BAD = {
    "a LoRA for a 5B": (for_a_5b, r"for a model 3072 wide \(Wan2.2 5B\); the loaded model is 128 wide"),
    "SDXL": (sdxl, r"looks like a Stable Diffusion or SDXL file"),
    "a web page": (lambda files: bytes_of(files, b"<!DOCTYPE html><html>not found</html>"), r"is a web page"),
    "a pickle": (lambda files: bytes_of(files, b"PK\x03\x04" + b"\0" * 64), r"PyTorch pickle"),
    "truncated": (truncated, r"is truncated"),
    "a header of 10 GB": (
        lambda files: bytes_of(files, struct.pack("<Q", 10 * 10**9) + b"{}" + b" " * 100),
        r"claims a header of 10,000,000,000 bytes",
    ),
    "a key twice": (lambda files: raw(files, f"{{{ENTRY}, {ENTRY}}}", b"\0" * 4), r"its header names 'a' twice"),
    "unknown keys": (unknown_keys, r"no parameter of a Wan transformer \(first '.*self_attn\.z\.lora_A\.weight'"),
    "too many blocks": (deeper, r"it has 2 blocks, the LoRA goes to 8"),
    "not finite": (not_finite, r"numbers that are not finite"),
    "infinite": (lambda files: not_finite(files, torch.inf), r"numbers that are not finite"),
    "a VAE": (a_vae, r"vae"),
    "a model of another kind": (of_another_kind, r"does not fit the loaded model"),
    "metadata of a newer version": (newer_metadata, r"`t3.version` cannot be used"),
}


@pytest.mark.parametrize("case", BAD)
def test_misfits_are_refused_and_nothing_is_applied(pack, files, node, case):
    make, words = BAD[case]
    entry = make(files)
    patcher = model("t2v")
    with pytest.raises(ValueError, match=words) as refused:
        run(node, model=patcher, file=entry)
    sentence = str(refused.value)
    assert "\n" not in sentence and re.search(r"[.)]$", sentence)
    assert not patcher.patches and not patcher.object_patches and not patcher.attachments
    assert is_untouched("t2v")


def test_other_models_are_refused(pack, files, node):
    import comfy.model_patcher

    class Unet(torch.nn.Module):
        pass

    class Base(torch.nn.Module):
        diffusion_model = Unet()

    patcher = comfy.model_patcher.ModelPatcher(Base(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match="works on Wan video models, and this one is a Unet"):
        run(node, model=patcher, file=retrofit(files)[0])


def test_onto_fresh_weights(pack, files, node):
    """`clone(force_deepcopy=True)`, as for dynamic VRAM and torch.compile: patches and plan come along."""
    import comfy.sd

    path = host_models.write_dit(files.base / "dit.safetensors", **SIZES)
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    assert all(torch.equal(p, state("t2v")[n]) for n, p in patcher.model.diffusion_model.named_parameters())
    patched, _ = run(node, model=patcher, file=retrofit(files)[0])
    fresh = patched.clone(force_deepcopy=True)
    assert fresh.model is not patched.model
    assert torch.equal(one_pass(fresh), one_pass(patched))
