"""How blocks share out their work by the memory that is free, and what the log says of it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import host_models
import pytest
import torch
from host_runs import forward, with_t3

from t3.memory import GIB

X, TEXT = torch.randn(1, 16, 6, 12, 12), torch.randn(1, 7, 48)
TOO_LITTLE = "That is too little"


@pytest.fixture
def model(t3):
    """Chunks are small, so that these few tokens are a video."""
    return host_models.patcher("t2v")


@pytest.fixture
def free(pack, monkeypatch):
    """`free(size)`: so many bytes are free to torch."""
    import comfy.model_management

    def to_torch(size):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: size)

    return to_torch


@pytest.fixture
def plan(pack, model):
    """`plan(patched, times)`: as many forward passes are planned, none run."""
    plan_forward_pass = sys.modules[f"{pack.__name__}.nodes.forward_pass"].plan_forward_pass

    def plan_passes(patched, times=1):
        installation = patched.object_patches["diffusion_model.blocks.0.forward"].__self__.installation
        base, settings, say = patched.model, installation.settings, installation.say
        for _ in range(times):
            found = plan_forward_pass(base, base.diffusion_model, X, {}, {}, settings, say)
        return found

    return plan_passes


@pytest.fixture
def needed(t3, model):
    """Bytes of a forward pass: `needed(share, compiled)`."""
    estimate, diffusion_model = t3.nodes.estimate, model.model.diffusion_model
    shape = estimate.block_shape(diffusion_model, 6 * 6 * 6, 1, 4)
    return lambda share, compiled=False: estimate.pass_bytes(diffusion_model, shape, share, compiled) * estimate.MARGIN


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-math"])
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (3, 0), (2, 30)])
@pytest.mark.parametrize("counts", [(2, 1, 1), (1, 2, 3), (2, 4, 6), (1, 1, 2)])
def test_what_lean_attention_may_work_in_is_enough_for_it(pack, monkeypatch, backend, prefix, suffix, counts):
    """Also for long windows, and where tokens stand beside the video."""
    parts = {name: sys.modules[f"{pack.__name__}.{name}"] for name in ("nodes.forward_pass", "nodes.wan", "t3")}
    monkeypatch.setattr(parts["nodes.forward_pass"], "LEAN_BYTES", 0)
    t3, chosen = parts["t3"], sys.modules[f"{pack.__name__}.t3.backends"].BACKENDS[backend]
    layout = parts["nodes.wan"].Layout(t3.Grid(2, 4, 6), prefix, suffix)
    tokens = 48 + prefix + suffix
    model, x = SimpleNamespace(dim=32, num_heads=2), torch.zeros(2, 16, 2, 8, 12)
    partitions = [t3.Partition(*counts)]
    memory = parts["nodes.forward_pass"]._memory(model, layout, x, torch.float32, partitions, chosen)
    qkv = torch.randn(3, 2, tokens, 2, 16).unbind(0)
    where = {"prefix": prefix, "backend": chosen}
    out = t3.t3_attention(*qkv, layout.grid, partitions[0], memory=memory, **where)
    assert torch.allclose(out, t3.t3_attention(*qkv, layout.grid, partitions[0], **where), atol=1e-5)


def test_auto_goes_by_free_memory_and_says_so(pack, model, free, plan, caplog):
    for size, words in ((2**40, "fast: all heads at once"), (1, TOO_LITTLE)):
        free(size)
        caplog.clear()
        plan(with_t3(pack, model)[0], times=2)
        assert caplog.text.count("memory: ") == 1 and words in caplog.text


def test_that_a_way_no_longer_fits_is_said_again(t3, pack, model, free, plan, needed, caplog):
    """The leanest way fits at first, and then does not."""
    leanest = t3.nodes.estimate.ways(model.model.diffusion_model)[-1]
    patched, _ = with_t3(pack, model)
    free(needed(leanest))
    assert plan(patched, times=2).share == leanest
    assert caplog.text.count("memory: lean") == 1 and TOO_LITTLE not in caplog.text
    free(needed(leanest) - 1)
    assert plan(patched, times=2).share == leanest
    assert caplog.text.count("memory: lean") == 2 and caplog.text.count(TOO_LITTLE) == 1


def test_a_way_the_user_chose_is_said_once(pack, model, free, plan, caplog):
    patched, _ = with_t3(pack, model, memory="lean")
    for size in (2**40, 1):
        free(size)
        plan(patched)
    assert caplog.text.count("as chosen") == 1


def test_weights_that_dynamic_vram_can_move_count_as_free(pack, model, free, plan, monkeypatch, caplog):
    """As for the host's own choice, whether condition and negative share a batch."""
    import comfy.memory_management
    import comfy.model_patcher

    free(1)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher.comfy_aimdo.model_vbar, "vbars_analyze", lambda device: 3 * GIB)
    patched, _ = with_t3(pack, model)
    patched.pre_run()
    try:
        plan(patched)
    finally:
        patched.cleanup()
    assert "memory: fast" in caplog.text and "of 3.0 GiB free" in caplog.text


@pytest.fixture
def compiled(monkeypatch):
    """The host's compile node, with a compiler that changes nothing."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    return lambda model: TorchCompileModel.execute(model, "inductor").result[0]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("mode", ["auto", "fast", "lean"])
def test_compiled_blocks_are_whole_whatever_is_chosen(t3, pack, model, free, needed, compiled, caplog, mode, order):
    """T3 before or after the compile node: too little is said of whole blocks, and that `memory` has no effect."""
    fast = t3.memory.Share()
    assert needed(fast) < needed(fast, True) - 1
    free(needed(fast, True) - 1)
    if order == "before":
        both = compiled(with_t3(pack, model, memory=mode)[0])
    else:
        both = with_t3(pack, compiled(model), memory=mode)[0]
    for _ in range(2):
        forward(both, X, text=TEXT)
    assert caplog.text.count("memory: fast") == 1 and caplog.text.count(TOO_LITTLE) == 1
    no_effect = f"memory {mode} has no effect under torch.compile"
    assert caplog.text.count(no_effect) == (mode != "auto")
    assert "as chosen" not in caplog.text
