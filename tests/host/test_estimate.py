"""The host's memory estimate: right for the patched clone, and never moved for the model that clones share."""

from __future__ import annotations

import json
import sys

import host_models
import pytest
import torch
from host_runs import sample, text_conds, transformer_options, with_t3
from install import ROOT

from t3.memory import BlockShape, Share, block_bytes, plain_block_bytes, shares

NOISE_4K = [1, 16, 21, 272, 480]
# What matters to memory in the 1.3B model; one layer is enough, since layers come one after the other.
SIZES_1_3B = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 1}


@pytest.fixture(scope="module")
def model(pack):
    return host_models.patcher("t2v", **SIZES_1_3B)


@pytest.fixture
def asked(pack, monkeypatch):
    """What the host asks memory for, without loading anything: `asked(patcher, shape)` gives `(most, least)` bytes.

    of_positive: what nodes put into the positive condition.
    """
    import comfy.model_management
    import comfy.sampler_helpers

    def ask(patcher, shape=NOISE_4K, **of_positive):
        seen = {}
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **kwargs: seen.update(kwargs))
        positive, negative = ([[c, {}] for c, _ in conds] for conds in text_conds(patcher))
        conds = {"positive": [{**c[1], **of_positive} for c in positive], "negative": [{**c[1]} for c in negative]}
        options = {**patcher.model_options, "transformer_options": transformer_options(patcher)}
        comfy.sampler_helpers.prepare_sampling(patcher, shape, conds, model_options=options)
        monkeypatch.undo()
        return seen["memory_required"], seen["minimum_memory_required"]

    return ask


BLOCK_4K = BlockShape(1536, 8960, 12, 1, 21 * 136 * 240, 4)


@pytest.mark.parametrize(("mode", "share"), [("fast", Share()), ("lean", shares(12)[-1])])
def test_the_host_reserves_what_t3_needs(pack, model, asked, mode, share):
    """A block, the rotations beside it, and what a sampler holds."""
    needed = block_bytes(BLOCK_4K, share)
    before = asked(model)
    most, least = asked(with_t3(pack, model, memory=mode)[0])
    assert 1.1 * needed <= least <= 1.35 * needed
    assert least < most <= before[0]
    assert asked(model) == before


def test_auto_reserves_for_the_fastest_way_that_fits_the_card(pack, model, asked, monkeypatch):
    import comfy.model_management

    reserved = []
    for gib in (12, 22, 28, 96):
        monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_, gib=gib, **__: gib * 2**30)
        reserved.append(asked(with_t3(pack, model)[0])[1])
    lean, fast = (asked(with_t3(pack, model, memory=mode)[0])[1] for mode in ("lean", "fast"))
    assert reserved[0] == lean and reserved[-1] == fast
    assert reserved == sorted(set(reserved))
    assert all(needed < 0.93 * gib * 2**30 for needed, gib in zip(reserved[1:], (22, 28, 96), strict=True))


def test_compiled_blocks_are_whole_and_reserved_for(pack, model, asked):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    patched = with_t3(pack, model, memory="fast")[0]
    compiled = TorchCompileModel.execute(patched, "inductor").result[0]
    assert asked(compiled)[1] > 1.1 * plain_block_bytes(BLOCK_4K) > 1.5 * asked(patched)[1]


def on_meta(channels, *size):
    return torch.empty(1, channels, *size, device="meta")


NOISE_1080P = [1, 16, 21, 136, 240]
BESIDE = {
    "appended frames": ({"time_dim_concat": on_meta(16, 4, 136, 240)}, 4 * 68 * 120),
    "latents in context": ({"context_latents": [on_meta(16, 21, 136, 240), on_meta(16, 1, 68, 120)]}, 21 * 8160 + 2040),
}


@pytest.mark.parametrize(("mode", "share"), [("fast", Share()), ("lean", shares(12)[-1])])
@pytest.mark.parametrize("beside", BESIDE)
def test_tokens_beside_the_video_are_reserved_for(pack, model, asked, beside, mode, share):
    """The host does not count them; one condition that has them is enough."""
    conditions, more = BESIDE[beside]
    video = 21 * 68 * 120
    needed = block_bytes(BlockShape(1536, 8960, 12, 1, video + more, 4, more), share)
    patched = with_t3(pack, model, memory=mode)[0]
    most, least = asked(patched, NOISE_1080P, **conditions)
    assert 1.1 * needed <= least <= 1.35 * needed
    assert asked(patched, NOISE_1080P) < (most, least)
    assert asked(model, NOISE_1080P, **conditions) == asked(model, NOISE_1080P)


def test_auto_reserves_for_a_leaner_way_where_tokens_stand_beside_the_video(pack, model, asked, monkeypatch):
    import comfy.model_management

    conditions, _ = BESIDE["latents in context"]
    fast = asked(with_t3(pack, model, memory="fast")[0], NOISE_1080P, **conditions)[1]
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_, **__: 0.9 * fast)
    assert asked(with_t3(pack, model)[0], NOISE_1080P, **conditions)[1] < 0.9 * fast


AS_NODES_LEAVE_THEM = {
    "t2v": {
        "time_dim_concat": torch.zeros(1, 16, 2, 12, 12),
        "context_latents": [torch.zeros(1, 16, 6, 12, 12), torch.zeros(1, 16, 1, 7, 6)],
        "reference_latents": [torch.zeros(1, 16, 1, 12, 12)],
    },
    "fun-control": {"reference_latents": [torch.zeros(1, 16, 1, 8, 8), torch.zeros(1, 16, 1, 12, 12)]},
    "humo": {"reference_latents": [torch.zeros(1, 16, 2, 12, 12)]},
    "scail": {
        "time_dim_concat": torch.zeros(1, 16, 1, 12, 12),
        "reference_latents": [torch.zeros(1, 16, 1, 12, 12)],
        "pose_video_latent": torch.zeros(1, 16, 6, 6, 6),
    },
    "s2v": {"reference_latents": [torch.zeros(1, 16, 1, 12, 12)]},
}


@pytest.mark.parametrize("kind", AS_NODES_LEAVE_THEM)
def test_tokens_beside_the_video_before_and_while_sampling_agree(pack, kind):
    """Those the host counts by itself are left to it."""
    wan = sys.modules[f"{pack.__name__}.nodes.wan"]
    base = host_models.base_model(kind)
    x, conditions = torch.zeros(1, 16, 6, 12, 12), AS_NODES_LEAVE_THEM[kind]
    made = base.extra_conds(**conditions, noise=x, device=x.device, cross_attn=torch.zeros(1, 7, 48))
    by_host = base.memory_usage_factor_conds
    given = {name: cond.cond for name, cond in made.items() if name not in by_host}
    found = wan.tokens_beside(base.diffusion_model, x.shape, conditions, by_host)
    assert found == (wan.layout(base.diffusion_model, x, given).beside or 0)
    assert (found > 0) == (kind != "s2v")


def test_context_windows_and_t3_in_any_order(pack, model, asked):
    from test_composition import context_windows

    first = asked(context_windows(with_t3(pack, model, memory="fast")[0]))
    second = asked(with_t3(pack, context_windows(model), memory="fast")[0])
    assert first == pytest.approx(second, rel=0.01)
    alone = asked(with_t3(pack, model, memory="fast")[0], [1, 16, 4, 272, 480])
    assert first[1] == pytest.approx(alone[1], rel=0.01)


def test_condition_and_negative_share_a_batch_only_where_it_pays(pack, model):
    estimating = sys.modules[f"{pack.__name__}.nodes.estimate"]._Estimating(model.model, samples=1)
    assert estimating.memory_required([2, *NOISE_4K[1:]]) == float("inf")
    assert estimating.memory_required(NOISE_4K) < model.model.memory_required(NOISE_4K)
    small = [2, 16, 21, 60, 104]
    assert estimating.memory_required(small) < float("inf")
    assert estimating.current_patcher is model.model.current_patcher


def test_clips_that_are_sampled_together_stay_together(pack, model):
    estimating = sys.modules[f"{pack.__name__}.nodes.estimate"]._Estimating(model.model, samples=2)
    assert estimating.memory_required([2, *NOISE_4K[1:]]) < float("inf")
    assert estimating.memory_required([4, *NOISE_4K[1:]]) == float("inf")


@pytest.mark.parametrize("uncounted", [0, 21 * 136 * 240])
def test_no_more_is_asked_for_than_the_host_would(pack, model, monkeypatch, uncounted):
    """For as many tokens; it may know of less where a model is of another kind."""
    estimate = sys.modules[f"{pack.__name__}.nodes.estimate"]
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1000.0)
    assert estimate.memory_required(model.model, NOISE_4K, uncounted=uncounted) == (2000.0 if uncounted else 1000.0)


@pytest.mark.parametrize("width", [2, 34, 480])
def test_the_shape_the_host_is_handed_asks_for_enough(pack, model, width):
    estimate, seen, shape = sys.modules[f"{pack.__name__}.nodes.estimate"], [], [1, 16, 21, 272, width]
    estimate.prepare_sampling("fast", lambda patcher, handed, conds: seen.append(handed), model, shape, {})
    assert seen[0][:-1] == shape[:-1] and 1 <= seen[0][-1] <= width
    assert model.model.memory_required(seen[0]) >= estimate.memory_required(model.model, shape)


def test_the_shared_estimate_never_moves(pack):
    """Asked before, at every point of a patched run that another node can hook, and after."""
    import comfy.patcher_extension

    model = host_models.patcher("t2v")
    expected = model.model.memory_required(NOISE_4K)
    found = []

    def look(*_):
        found.append((model.model.memory_required(NOISE_4K), model.memory_required(NOISE_4K)))
        assert "memory_required" not in model.model.__dict__

    patched, _ = with_t3(pack, model)
    kinds = comfy.patcher_extension.WrappersMP
    for kind in (
        kinds.OUTER_SAMPLE,
        kinds.PREPARE_SAMPLING,
        kinds.CALC_COND_BATCH,
        kinds.APPLY_MODEL,
        kinds.DIFFUSION_MODEL,
    ):

        def wrapper(executor, *args, **kwargs):
            look()
            try:
                return executor(*args, **kwargs)
            finally:
                look()

        patched.add_wrapper_with_key(kind, "test", wrapper)

    def around(apply_model, arguments):
        look()
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patched.set_model_unet_function_wrapper(around)
    look()
    sample(patched, torch.zeros(1, 16, 3, 8, 6), callback=look)
    look()
    sample(model, torch.zeros(1, 16, 3, 8, 6), callback=look)
    assert len(found) > 15
    assert set(found) == {(expected, expected)}


MEASURED = json.loads((ROOT / "benchmarks/estimates_h200.json").read_text(encoding="utf-8"))["1.3b"]
KINDS = {
    "text to video": ("t2v", {}, 0),
    "image to video": ("i2v", {}, 0),
    "a reference image": ("fun-control", {}, 136 * 240),
    "a frame in context": ("t2v", {}, 136 * 240),
    "VACE": ("vace", {"num_layers": 2, "vace_layers": 1}, 0),
}


@pytest.mark.parametrize(("memory", "share"), [("fast", Share()), ("lean", Share(1, 4))])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind_took_no_more_than_is_asked_for(pack, monkeypatch, kind, memory, share):
    """What was measured on a card at 4K, beside the weights, in float16."""
    estimate = sys.modules[f"{pack.__name__}.nodes.estimate"]
    name, more, beside = KINDS[kind]
    base = host_models.base_model(name, **{**SIZES_1_3B, **more})
    monkeypatch.setattr(base, "get_dtype_inference", lambda: torch.float16)
    row = MEASURED[f"estimate: {kind}, memory {memory}"]
    needed = estimate.memory_required(base, NOISE_4K, None, share, uncounted=beside) / 2**30
    assert row["beside_weights_gib"] <= needed <= 1.2 * row["beside_weights_gib"]
