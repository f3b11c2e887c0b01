"""T3 Attention beside other nodes, before and after it. The matrix of docs/composition.md is this file.

Whatever the order, the result must be the same, must differ from the result without T3, and windows must really run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from types import SimpleNamespace

import host_models
import pytest
import torch
from host_runs import forward, plan_of, sample, text_conds, with_t3

LATENT = (1, 16, 6, 12, 12)


@pytest.fixture(scope="module")
def dit(pack, tmp_path_factory):
    """A diffusion model file, and the host's loader for it: such patchers can be cloned onto fresh weights."""
    import comfy.sd

    path = host_models.write_dit(tmp_path_factory.mktemp("models") / "dit.safetensors")
    return lambda: comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


@pytest.fixture
def windowed(pack, monkeypatch):
    """Counts the calls of `t3_attention`; `windowed.count` and `windowed.backends`."""

    module = sys.modules[f"{pack.__name__}.nodes.patch"]
    original = module.t3_attention
    spy = SimpleNamespace(count=0, backends=[])

    def counting(*args, **kwargs):
        spy.count += 1
        backend = kwargs["backend"]
        spy.backends.append(backend if isinstance(backend, str) else backend.name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "t3_attention", counting)
    return spy


# --- The nodes that stand before or after T3 -----------------------------------------------------------------------


def lora(model, tmp_path, monkeypatch):
    """LoraLoaderModelOnly with a LoRA on the very projections T3 calls."""
    import folder_paths
    from safetensors.torch import save_file

    from nodes import LoraLoaderModelOnly

    generator = torch.Generator().manual_seed(8)
    state = {}
    for i in range(5):
        for name in ("q", "v", "o"):
            key = f"diffusion_model.blocks.{i}.self_attn.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(4, 256, generator=generator) / 8
            state[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) / 8
    save_file(state, tmp_path / "style.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return LoraLoaderModelOnly().load_lora_model_only(model, "style.safetensors", 1.0)[0]


def plain_override(model, *_):
    """A node that sets an attention of its own (half the scale, so that its work shows)."""
    model = model.clone()

    def override(original, q, k, v, *args, **kwargs):
        return original(q * 0.5, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def layout_aware_override(model, *_):
    """As sparse-attention packs do: cuts up the whole video where it is told the grid, and passes on all else."""
    model = model.clone()

    def override(original, q, k, v, *args, **kwargs):
        grid = kwargs["transformer_options"].get("grid_sizes")
        if grid is not None and q.shape[1] == k.shape[1]:
            assert q.shape[1] == math.prod(grid), "took a window for the whole video"
        return original(q * 0.5, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def attn1_patch(model, *_):
    """A patch that reads rotated, token-ordered q and k and changes the output."""
    model = model.clone()

    def patch(args):
        assert args["q"].shape == args["k"].shape == (*args["x"].shape[:2], 2, 128)
        return args["x"] + 0.1 * args["q"].flatten(2)

    model.set_model_patch(patch, "attn1_patch")
    return model


def context_windows(model, *_):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    arguments = {"closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False}
    arguments |= {"context_schedule": "standard_static", "context_stride": 1, "causal_window_fix": False}
    return ContextWindowsManualNode.execute(model, context_length=4, context_overlap=2, **arguments).result[0]


def model_sampling(model, *_):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, 5.0)[0]


def easy_cache(model, *_):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).result[0]


def merged(model, *_):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(model, host_models.patcher("t2v", seed=9), 0.5)[0]


def fresh_weights(model, *_):
    return model.clone(force_deepcopy=True)


def other_device(model, *_):
    """What MultiGPU CFG Split makes for each further card."""
    return model.deepclone_multigpu(new_load_device=torch.device("cpu"))


OTHERS = [
    lora,
    plain_override,
    layout_aware_override,
    attn1_patch,
    context_windows,
    model_sampling,
    easy_cache,
    merged,
    fresh_weights,
    other_device,
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)
def test_the_order_of_nodes_does_not_matter(pack, dit, windowed, tmp_path, monkeypatch, other, caplog):
    latent, steps = torch.zeros(LATENT), 4
    model = dit()
    without = sample(other(model, tmp_path, monkeypatch), latent, steps=steps)
    assert windowed.count == 0
    with caplog.at_level(logging.WARNING):
        after = sample(other(with_t3(pack, model)[0], tmp_path, monkeypatch), latent, steps=steps)
        calls = windowed.count
        before = sample(with_t3(pack, other(model, tmp_path, monkeypatch))[0], latent, steps=steps)
    assert calls > 0 and windowed.count == 2 * calls
    assert torch.equal(before, after)
    assert (before - without).norm() > 0.01 * without.norm()
    if other not in (fresh_weights, other_device):
        alone = sample(with_t3(pack, model)[0], latent, steps=steps)
        skips_nothing = other is easy_cache and calls == 5 * steps
        assert torch.equal(alone, before) == skips_nothing
    chosen = other in (plain_override, layout_aware_override)
    assert set(windowed.backends[: 2 * calls]) == ({"host"} if chosen else {"sdpa"})
    assert caplog.text.count("chosen by another node's attention override") == (2 if chosen else 0)


def foreign_patch(model, patched_blocks=range(5)):
    """As enhance-a-video and sage nodes for Wan do: a forward of their own on each self-attention."""
    model = model.clone()
    for i in patched_blocks:
        attn = model.model.diffusion_model.blocks[i].self_attn

        def forward(x, freqs, transformer_options=None, attn=attn):
            return 0.5 * type(attn).forward(attn, x, freqs, transformer_options=transformer_options or {})

        model.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", forward)
    return model


def test_a_foreign_patch_before_t3_is_named(pack, dit, windowed):
    model = dit()
    patched, report = with_t3(pack, foreign_patch(model))
    assert f"Replaces the self-attention patch of {__name__}" in report
    latent = torch.zeros(LATENT)
    assert torch.equal(sample(patched, latent), sample(with_t3(pack, model)[0], latent))
    assert windowed.count


@pytest.mark.parametrize(("blocks", "calls"), [(range(1, 3), 3), (range(5), 0)])
def test_a_foreign_patch_after_t3_is_named(pack, dit, windowed, caplog, blocks, calls):
    patched = foreign_patch(with_t3(pack, dit())[0], blocks)
    with caplog.at_level(logging.WARNING):
        sample(patched, torch.zeros(LATENT), steps=3)
    assert caplog.text.count(f"{len(blocks)} blocks run the later self-attention patch of {__name__}") == 1
    assert windowed.count == 3 * calls


def test_a_second_t3_node_replaces_the_first(pack, dit, windowed):
    model, latent = dit(), torch.zeros(LATENT)
    once, _ = with_t3(pack, model, dense_blocks="1-4")
    first = sample(once, latent)
    assert windowed.count == 2
    twice, report = with_t3(pack, once)
    assert "Replaces the T3 attention of a node before it." in report
    assert torch.equal(sample(twice, latent), sample(with_t3(pack, model)[0], latent))
    assert torch.equal(sample(once, latent), first), "the first node's model changed"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_torch_compile(pack, tmp_path, order):
    """The host's compile node: the same result to rounding, and for a second size of video too."""
    import comfy.sd
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    path = host_models.write_dit(tmp_path / "dit.safetensors", num_layers=2)
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    plan = {"custom_plan": plan_of(pack, [[1, 2, 3], [2, 2, 1]])}
    t3 = with_t3(pack, model, **plan)[0]
    if order == "before":
        plain_compiled = TorchCompileModel.execute(model, "inductor").result[0]
        compiled = with_t3(pack, plain_compiled, **plan)[0]
    else:
        compiled = TorchCompileModel.execute(t3, "inductor").result[0]
    text = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(1))
    for size in ((6, 12, 12), (5, 14, 10)):
        x = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(2))
        expected, plain = forward(t3, x, text=text), forward(model, x, text=text)
        if order == "before":
            # Code compiled without T3 must not be taken for the patched model.
            assert (forward(plain_compiled, x, text=text) - plain).norm() < 1e-4 * plain.norm()
        found = forward(compiled, x, text=text)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert (expected - plain).norm() > 1e-2 * expected.norm()


def test_unloaded_and_loaded_again(pack, dit):
    import comfy.model_management

    model, latent = dit(), torch.zeros(LATENT)
    patched, _ = with_t3(pack, model)
    plain, first = sample(model, latent), sample(patched, latent)
    for _ in range(2):
        comfy.model_management.unload_all_models()
        assert "forward" not in model.model.diffusion_model.blocks[0].self_attn.__dict__ or not patched_in(model)
        assert torch.equal(sample(patched, latent), first)
        assert torch.equal(sample(model, latent), plain)


def patched_in(model) -> bool:
    """Whether a patch of ours is in place in the shared model right now."""
    forward = model.model.diffusion_model.blocks[0].self_attn.__dict__.get("forward")
    return type(getattr(forward, "__self__", None)).__name__ == "T3SelfAttention"


def test_cancelled_within_one_block_then_run_again(pack, dit, windowed):
    import comfy.model_management

    model, latent = dit(), torch.zeros(LATENT)
    patched, _ = with_t3(pack, model)
    expected = sample(patched, latent)
    plain = sample(model, latent)
    windowed.count = 0
    blocks = model.model.diffusion_model.blocks
    hook = blocks[2].ffn.register_forward_hook(lambda *_: comfy.model_management.interrupt_current_processing(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, latent)
    hook.remove()
    assert windowed.count == 3, "block 3 must not have attended"
    assert torch.equal(sample(patched, latent), expected)
    assert torch.equal(sample(model, latent), plain)


def test_nothing_of_a_pass_outlives_it(pack):
    """Whatever ended it; a copy on the same weights shares what was said, one of its own does not."""
    patched, _ = with_t3(pack, host_models.patcher("t2v"))
    installation = patched.object_patches["diffusion_model.blocks.0.self_attn.forward"].__self__.installation
    x, text, seen = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 7, 48), []

    def attend(original, *args, **kwargs):
        seen.append(installation.current)
        if fails:
            raise RuntimeError("no more")
        return original(*args, **kwargs)

    for fails in (False, True):
        options = {"optimized_attention_override": attend}
        with pytest.raises(RuntimeError, match="no more") if fails else contextlib.nullcontext():
            forward(patched, x, text=text, options=options)
        assert seen[-1] is not None and installation.current is None
    key = "diffusion_model.blocks.0.self_attn.forward"
    assert patched.clone().object_patches[key].__self__.installation is installation


def test_the_other_branch_and_a_second_sampler(pack, dit):
    """One clone feeds two samplers, the un-patched model a third, in any order: each as if it were alone."""
    model, latent = dit(), torch.zeros(LATENT)
    plain = sample(model, latent)
    patched, _ = with_t3(pack, model)
    first = sample(patched, latent)
    assert torch.equal(sample(model, latent), plain)
    larger = sample(patched, torch.zeros(1, 16, 3, 16, 10))
    assert larger.shape == (1, 16, 3, 16, 10)
    assert torch.equal(sample(patched, latent), first)
    assert torch.equal(sample(model, latent), plain)
    assert not torch.equal(plain, first)


@pytest.mark.parametrize("storage", ["fp8_e4m3fn", "fp8_e5m2"])
def test_weights_stored_in_fp8(pack, tmp_path, windowed, storage):
    import comfy.sd

    dtype = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[storage]
    path = host_models.write_dit(tmp_path / "dit.safetensors")
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
    assert model.model.diffusion_model.blocks[0].self_attn.q.weight.dtype == dtype
    latent = torch.zeros(LATENT)
    patched = sample(with_t3(pack, model)[0], latent)
    assert torch.isfinite(patched).all() and windowed.count
    assert (patched - sample(model, latent)).norm() > 0.01 * patched.norm()


def test_quantised_weights(pack, tmp_path, windowed):
    """Scaled fp8, as the models people download are: the host keeps them as quantised tensors of its own."""
    import comfy.sd
    from safetensors.torch import load_file, save_file

    path = host_models.write_dit(tmp_path / "dit.safetensors")
    state, scaled = load_file(path), {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in state.items():
        if ".self_attn." in key and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            scaled[key] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            scaled[key] = tensor
    save_file(scaled, path, metadata=host_models.metadata())
    model = comfy.sd.load_diffusion_model(str(path))
    assert type(model.model.diffusion_model.blocks[0].self_attn.q.weight).__name__ == "QuantizedTensor"
    latent = torch.zeros(LATENT)
    patched = sample(with_t3(pack, model)[0], latent)
    assert torch.isfinite(patched).all() and windowed.count
    assert (patched - sample(model, latent)).norm() > 0.01 * patched.norm()


def test_condition_and_negative_in_one_batch_or_apart(pack, dit, monkeypatch):
    """The same to rounding, whichever the host chooses."""
    patched, latent = with_t3(pack, dit())[0], torch.zeros(LATENT)
    batches = []
    hook = patched.model.diffusion_model.blocks[0].register_forward_hook(lambda m, a, out: batches.append(out.shape[0]))
    together = sample(patched, latent)
    monkeypatch.setattr(type(patched), "get_free_memory", lambda *_: 0)
    apart = sample(patched, latent)
    hook.remove()
    assert batches == [2, 2, 1, 1, 1, 1]
    assert (together - apart).norm() < 1e-5 * together.norm()


def test_start_end_and_dense_blocks(pack, dit, windowed):
    model, latent = dit(), torch.zeros(LATENT)
    plain = sample(model, latent, steps=10)
    sample(with_t3(pack, model, start_percent=0.2)[0], latent, steps=10)
    late = windowed.count // 5
    sample(with_t3(pack, model, end_percent=0.2)[0], latent, steps=10)
    early = windowed.count // 5 - late
    assert early + late == 10 and 0 < early < late
    windowed.count = 0
    all_dense = sample(with_t3(pack, model, dense_blocks="0-4")[0], latent, steps=10)
    assert torch.equal(all_dense, plain) and not windowed.count
    sample(with_t3(pack, model, dense_blocks="0, 2-3")[0], latent, steps=10)
    assert windowed.count == 2 * 10


def test_lean_memory_gives_the_same(pack, dit, monkeypatch):
    module = sys.modules[f"{pack.__name__}.nodes.forward_pass"]
    monkeypatch.setattr(module, "LEAN_BYTES", 1)
    model, latent = dit(), torch.zeros(LATENT)
    fast, lean = (sample(with_t3(pack, model, memory=memory)[0], latent) for memory in ("fast", "lean"))
    assert (fast - lean).norm() < 1e-5 * fast.norm()


def test_an_image_in_reference_latents(pack, dit, windowed):
    """Conditions set by nodes arrive: reference latents of the host's Fun-Control, through a whole sampling."""
    model = host_models.patcher("fun-control")
    patched, _ = with_t3(pack, model)
    conds = text_conds(model, reference_latents=[torch.randn(1, 16, 1, 12, 12)])
    out = sample(patched, torch.zeros(LATENT), conds=conds)
    assert torch.isfinite(out).all() and windowed.count == 2 * 5
