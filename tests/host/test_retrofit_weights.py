"""T3 LoRA Retrofit Loader: what is in the model then is the arithmetic by hand, and nothing once it is removed."""

from __future__ import annotations

import host_models
import pytest
import torch
from host_nodes import run
from host_weights import KINDS, SIZES, Folders, is_untouched, loaded, model, state, weights
from weights_fixtures import one_thread as one_thread
from weights_kinds import DIALECTS, FORMS, FULL_PREFIXES, adapter, by_hand, full_tensors

pytest_plugins = ["host_node_fixtures"]

STRENGTHS = (0.0, 1.0, -0.5, 1.5)


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    return Folders(tmp_path, monkeypatch)


@pytest.fixture
def load(nodes):
    def call(patcher, file, strength=1.0, **inputs):
        return run(nodes["T3RetrofitLoader"], model=patcher, file=file, strength=strength, **inputs)

    return call


def check(have, want, changed):
    """The weights a model computes with against those by hand; what no file names stays bit for bit."""
    for name, tensor in have.items():
        if name in changed:
            torch.testing.assert_close(tensor.double(), want[name], rtol=3e-6, atol=3e-6, msg=name)
        else:
            assert torch.equal(tensor.double(), want[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_adapters(pack, files, load, kind, form):
    """Every dialect, at strengths in turn."""
    for i, dialect in enumerate(DIALECTS):
        strength = STRENGTHS[(i + len(form)) % len(STRENGTHS)]
        tensors, deltas = adapter(kind, form, dialect, state=state(kind))
        patched, report = load(model(kind), files.save(tensors, f"{dialect}.safetensors"), strength)
        assert f"{len(tensors)} tensors onto {len(deltas) if strength else 0} parameters" in report
        check(weights(patched), by_hand(state(kind), deltas, strength), deltas if strength else ())
    assert is_untouched(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", [*FULL_PREFIXES, "diffusers"])
def test_whole_models(pack, files, load, kind, dialect):
    base = state(kind)
    # Exactly representable, and enough of it to see where it goes.
    tuned = {name: tensor + 0.25 for name, tensor in base.items()}
    folder = "diffusion_models" if dialect == "original" else "loras"
    entry = files.save(full_tensors(kind, dialect, tuned), folder=folder)
    at = list(KINDS).index(kind) + len(dialect)
    for strength in (1.0, STRENGTHS[at % 4]):
        patched, report = load(model(kind), entry, strength)
        want = {name: tensor.double() + strength * (tuned[name].double() - tensor) for name, tensor in base.items()}
        check(weights(patched), want, base if strength not in (0, 1) else ())
        assert "Full checkpoint" in report
    assert is_untouched(kind)


def test_stacked_and_removed(pack, files, load):
    """The second sees what the first left, which matters to DoRA, to replaced weights, and to tables."""
    patched, want, changed = model("t2v"), state("t2v"), set()
    order = [("dora", "original", 0.5), ("mixed", "diffusers", -1.5), ("dora", "kohya", 1.0), ("set", "peft", 0.5)]
    order.append(("mixed", "comfyui", 1.0))
    steps = []
    for i, (form, dialect, strength) in enumerate(order):
        tensors, deltas = adapter("t2v", form, dialect, seed=10 + 500 * i, state=state("t2v"))
        patched, _ = load(patched, files.save(tensors, f"{i}.safetensors"), strength)
        want, changed = by_hand(want, deltas, strength), changed | deltas.keys()
        steps.append((patched, want, set(changed)))
    # In any order: each clone is what it was made to be, and the base what it was.
    for patched, want, changed in reversed(steps):
        check(weights(patched), want, changed)
        assert is_untouched("t2v")
    with loaded(steps[-1][0]), loaded(model("t2v")) as parameters:
        assert all(torch.equal(parameter, state("t2v")[name]) for name, parameter in parameters.items())


def test_two_changes_to_one_parameter_add_up(pack, files, load):
    base = state("t2v")["blocks.0.self_attn.q.weight"]
    stem, (rows, columns) = "diffusion_model.blocks.0.self_attn.q", base.shape
    down, up, diff = torch.randn(4, columns), torch.randn(rows, 4), torch.randn(rows, columns)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.diff": diff}
    patched, _ = load(model("t2v"), files.save(tensors), 0.5)
    want = base.double() + 0.5 * (up.double() @ down.double() + diff.double())
    torch.testing.assert_close(weights(patched)["blocks.0.self_attn.q.weight"].double(), want, rtol=3e-6, atol=3e-6)


def test_a_replaced_weight_is_not_the_file_s_own_tensor(pack):
    """The host adds what other patches bring in place."""
    tensor = torch.randn(4, 4)
    before = tensor.clone()
    patch = pack.nodes.weight_patches.T3WeightPatch({"x"}, ("set", 1.0, (("set", tensor),)))
    found = patch.calculate_weight(torch.zeros(4, 4), "x", 1.0, 1.0, None, None)
    assert torch.equal(found, before)
    found.add_(1)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_the_hosts_loader(pack, files, load, first):
    """LoraLoaderModelOnly before and after."""
    from nodes import LoraLoaderModelOnly

    base = state("vace")
    tensors, deltas = adapter("vace", "mixed", "kohya", state=base)
    style, more = adapter("vace", "lora", "comfyui", seed=900, state=base)
    t3, other = files.save(tensors, "t3.safetensors"), files.save(style, "style.safetensors").split("/")[1]

    def theirs(patcher):
        return LoraLoaderModelOnly().load_lora_model_only(patcher, other, 0.75)[0]

    patched = theirs(load(model("vace"), t3)[0]) if first == "ours" else load(theirs(model("vace")), t3)[0]
    want = by_hand(by_hand(base, deltas, 1.0), more, 0.75)
    check(weights(patched), want, deltas | more)
    assert is_untouched("vace")


def test_the_hosts_loader_leaves_tables_out(pack, files, load):
    """Why T3's loader goes another way for them: ComfyUI takes the patch and never applies it."""
    from nodes import LoraLoaderModelOnly

    change = torch.ones(1, 6, 128)
    entry = files.save({"diffusion_model.blocks.0.modulation.diff": change})
    theirs = LoraLoaderModelOnly().load_lora_model_only(model("t2v"), entry.split("/")[1], 1.0)[0]
    ours = load(model("t2v"), entry)[0]
    for patched, expected in ((theirs, 0), (ours, 1)):
        have = weights(patched)["blocks.0.modulation"]
        torch.testing.assert_close(have, state("t2v")["blocks.0.modulation"] + expected)


def test_merged(pack, files, load):
    """ModelMergeSimple of a patched model with another one: halfway between the two."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    tensors, deltas = adapter("t2v", "dora", "comfyui", state=state("t2v"))
    patched, _ = load(model("t2v"), files.save(tensors))
    other = host_models.patcher("t2v", seed=9, **SIZES)
    have = weights(ModelMergeSimple().merge(other, patched, 0.5)[0])
    want = by_hand(state("t2v"), deltas, 1.0)
    second = dict(other.model.diffusion_model.named_parameters())
    for name in deltas:
        half = (want[name] + second[name].double()) / 2
        torch.testing.assert_close(have[name].double(), half, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("form", ["dora", "mixed"])
def test_low_memory(pack, files, load, form):
    """Where the host patches weights as they are used, in the model's own number format."""
    from comfy.model_patcher import LowVramPatch

    tensors, deltas = adapter("t2v", form, "diffsynth", state=state("t2v"))
    patched, _ = load(model("t2v"), files.save(tensors), -0.5)
    want = by_hand({name: tensor.bfloat16().float() for name, tensor in state("t2v").items()}, deltas, -0.5)
    seen = 0
    for key in patched.patches:
        name = key.removeprefix("diffusion_model.")
        late = LowVramPatch(key, patched.patches)
        room = torch.empty(late.memory_required(), dtype=torch.uint8)
        assert room.numel() >= sum(tensor.nbytes for _, tensor in patched.patches[key][0][1].weights[2])
        late.prepare(room, None)
        have = late(state("t2v")[name].bfloat16())
        assert have.dtype == torch.bfloat16
        off = (have.double() - want[name]).abs()
        assert (off <= want[name].abs() * 2.0**-8 + 1e-5).all(), name
        seen += 1
    assert seen == len([name for name in deltas if "modulation" not in name])


def test_a_forward_pass_in_low_memory(pack, files, load):
    """The same as with everything in place, tables included."""
    from host_runs import forward

    tensors, _ = adapter("t2v", "mixed", "comfyui", state=state("t2v"))
    patched, _ = load(model("t2v"), files.save(tensors))
    x = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(2))
    plain, expected = forward(model("t2v"), x, text=text), forward(patched, x, text=text)
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    late = [m for m in patched.model.diffusion_model.modules() if getattr(m, "weight_function", None)]
    with torch.inference_mode():
        found = patched.model.apply_model(x, torch.full((1,), 0.9), c_crossattn=text, transformer_options={})
    patched.unpatch_model(torch.device("cpu"))
    assert late
    assert (found - expected).norm() < 1e-5 * expected.norm() < (expected - plain).norm()
    assert is_untouched("t2v")


def test_weights_of_a_scaled_fp8_file(pack, files, load):
    """A whole model and a diff whose tensors have scales: the sums are those of what the scales say."""
    base, stored, tuned = state("t2v"), {}, {}
    for name, tensor in base.items():
        stored[name] = tuned[name] = tensor
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            stored[name] = (tensor / 0.01).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
            tuned[name] = stored[name].float() * 0.01
    for strength in (1.0, 0.5):
        patched, report = load(model("t2v"), files.save(stored), strength)
        want = {name: tensor.double() + strength * (tuned[name].double() - tensor) for name, tensor in base.items()}
        check(weights(patched), want, base)
    assert "Known, and of no use here" in report and "scale_weight" in report


@pytest.mark.parametrize("storage", ["fp8", "scaled fp8", "bf16"])
def test_bases_in_other_number_formats(pack, files, load, storage):
    """The base is what it stands for; the result is rounded to its format once, by the host."""
    import comfy.sd
    from safetensors.torch import save_file

    scaled = {}
    for name, tensor in state("t2v").items():
        scaled[name] = tensor
        if storage == "scaled fp8" and ".self_attn." in name and tensor.ndim == 2:
            scaled[name] = (tensor / 0.01).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = torch.tensor([0.01])
    if storage == "scaled fp8":
        scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path = files.base / "base.safetensors"
    save_file(scaled, path, metadata=host_models.metadata(24))
    dtype = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}.get(storage)
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype} if dtype else {})
    base = {name: _plain(p) for name, p in patcher.model.diffusion_model.named_parameters()}
    tensors, deltas = adapter("t2v", "dora", "diffusers", state=state("t2v"))
    patched, _ = load(patcher, files.save(tensors))
    step = {"bf16": 2.0**-8}.get(storage, 2.0**-3)
    with loaded(patched) as parameters:
        for name, want in by_hand(base, deltas, 1.0).items():
            off = (_plain(parameters[name]).double() - want).abs()
            assert (off <= (want.abs() * step + 2e-2 if name in deltas else 0 * off)).all(), name


def _plain(parameter):
    data = parameter.detach()
    return (data.dequantize() if hasattr(data, "dequantize") and "Quantized" in type(data).__name__ else data).float()
