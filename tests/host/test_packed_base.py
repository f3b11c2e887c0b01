"""T3 weights on a base that another pack (for GGUF) quantised and patches: accepted, and the sums are those by hand."""

from __future__ import annotations

import host_models
import pytest
import torch
from host_nodes import run
from host_runs import forward
from host_weights import SIZES, Folders
from weights_fixtures import one_thread as one_thread
from weights_kinds import adapter, by_hand

from t3 import Plan
from t3.weights import T3Metadata
from t3.weights.fingerprint import fingerprint

pytest_plugins = ["host_node_fixtures"]


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    return Folders(tmp_path, monkeypatch)


@pytest.fixture
def base(pack):
    import host_packed

    return host_packed.pack_model(host_models.patcher("t2v", **SIZES))


def in_place(patcher):
    """What the layers compute with while ComfyUI has a model and its patches in place."""
    import comfy.model_management
    import host_packed

    comfy.model_management.load_models_gpu([patcher])
    have = host_packed.weights(patcher)
    comfy.model_management.unload_all_models()
    return have


def load(nodes, patcher, file, strength):
    return run(nodes["T3RetrofitLoader"], model=patcher, file=file, strength=strength)


@pytest.mark.parametrize("form", ["lora", "dora", "lokr factored", "set", "mixed"])
def test_the_sums(nodes, files, base, form):
    """On what the packed numbers stand for; taken off again, the same bytes are there."""
    state = in_place(base)
    tensors, deltas = adapter("t2v", form, "diffusers", state=state)
    patched, report = load(nodes, base, files.save(tensors), -0.5)
    assert f"{len(tensors)} tensors onto {len(deltas)} parameters" in report
    want = by_hand(state, deltas, -0.5)
    have = in_place(patched)
    assert have.keys() == want.keys() == state.keys()
    for name in want:
        torch.testing.assert_close(have[name].double(), want[name], rtol=3e-6, atol=3e-6, msg=name)
    assert all(torch.equal(tensor, state[name]) for name, tensor in in_place(base).items())


def test_a_plan_comes_along_and_the_base_is_known(nodes, files, base):
    """T3 attention runs in it; numbers of modulation and biases, which stay as they are, tell which base it is."""
    import comfy.model_management

    state = in_place(base)
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state)
    plan = Plan("small", (2, 4, 4), ((1, 2, 2), ("each", 1, 1)))
    x, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 7, 24)
    for mark, other in ((fingerprint("x", state, state.__getitem__), False), (None, False)):
        header = T3Metadata(plan=plan, base=mark).to_header()
        patched, report = load(nodes, base, files.save(tensors, metadata=header), 1.0)
        assert "T3 attention with plan small" in report and ("another base" in report) == other
    dense, _ = load(nodes, base, files.save(tensors, "dense.safetensors"), 1.0)
    found, expected = forward(patched, x, text=text), forward(dense, x, text=text)
    assert torch.isfinite(found).all() and (found - expected).norm() > 1e-3 * expected.norm()
    comfy.model_management.unload_all_models()


def test_another_base_is_told_and_a_wrong_shape_refused(nodes, files, base):
    state = in_place(base)
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state)
    foreign = {name: torch.randn(tensor.shape) for name, tensor in state.items()}
    header = T3Metadata(base=fingerprint("x", foreign, foreign.__getitem__)).to_header()
    assert "made for another base" in load(nodes, base, files.save(tensors, metadata=header), 1.0)[1]
    wide = {name: torch.cat([t, t]) if "lora_B" in name else t for name, t in tensors.items()}
    with pytest.raises(Exception, match="shapes do not fit|does not fit the loaded model"):
        load(nodes, base, files.save(wide, "wide.safetensors"), 1.0)


def test_a_base_whose_tables_are_packed_has_no_fingerprint(nodes, files, base):
    """Rather none than one of bytes taken for numbers."""
    import host_packed

    state = in_place(base)
    blocks = base.model.diffusion_model.blocks
    for block in blocks:
        block.modulation = torch.nn.Parameter(host_packed.pack(block.modulation), requires_grad=False)
    tensors, _ = adapter("t2v", "lora", "comfyui", state=state)
    header = T3Metadata(base=fingerprint("x", state, state.__getitem__)).to_header()
    assert "another base" not in load(nodes, base, files.save(tensors, metadata=header), 1.0)[1]
