"""An attention the user chose for ComfyUI does the work inside windows, unless it would do it wrong."""

from __future__ import annotations

import logging
import sys
from functools import partial

import host_models
import pytest
import torch
from host_runs import forward, with_t3

FLAGS = [
    "use_sage_attention",
    "use_flash_attention",
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
]
X, TEXT = torch.randn(1, 16, 6, 12, 12), torch.randn(1, 7, 48)


@pytest.fixture
def calls(pack, monkeypatch):
    """Tokens of each call of the host's own attention, inside windows or not."""
    import comfy.ldm.wan.model

    seen = []
    original = comfy.ldm.wan.model.optimized_attention

    def counting(q, k, v, **kwargs):
        if q.shape[1] == k.shape[1]:
            seen.append(q.shape[1])
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", counting)
    return seen


@pytest.mark.parametrize("flag", FLAGS)
def test_a_launch_flag_is_a_choice(pack, monkeypatch, calls, caplog, flag):
    from comfy.cli_args import args

    patched, report = with_t3(pack, host_models.patcher("t2v"))
    assert "chosen by" not in report
    expected = forward(patched, X, text=TEXT)
    assert not calls
    monkeypatch.setattr(args, flag, True)
    patched, report = with_t3(pack, host_models.patcher("t2v"))
    named = f"chosen by the launch flag --{flag.replace('_', '-')}"
    assert named in report
    with caplog.at_level(logging.WARNING):
        out = forward(patched, X, text=TEXT)
    assert calls and max(calls) < 6 * 6 * 6
    assert named in caplog.text
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_an_explicit_backend_beats_the_flag(pack, monkeypatch, calls):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "use_sage_attention", True)
    patched, report = with_t3(pack, host_models.patcher("t2v"), backend="sdpa-math")
    forward(patched, X, text=TEXT)
    assert not calls and "chosen by" not in report


def test_sageattention_1_is_passed_over_where_it_is_wrong(pack, monkeypatch, calls, caplog):
    """Windows of the test plan have no multiple of 64 tokens; those of one frame of 8 x 8 do."""
    from comfy.cli_args import args

    module = sys.modules[f"{pack.__name__}.nodes.host_attention"]
    backends = sys.modules[f"{pack.__name__}.t3.backends.registry"]
    monkeypatch.setattr(args, "use_sage_attention", True)
    monkeypatch.setattr(module, "installed", lambda package: True)
    monkeypatch.setattr(backends, "version", lambda package: "1.0.6")
    backends._sage_keys_multiple.cache_clear()
    try:
        patched, _ = with_t3(pack, host_models.patcher("t2v"))
        with caplog.at_level(logging.WARNING):
            forward(patched, X, text=TEXT)
        assert not calls and caplog.text.count("sageattention, as installed, is wrong for windows of") == 1
        plan = with_t3(pack, host_models.patcher("t2v"), custom_plan=plan_of_frames(pack))[0]
        forward(plan, torch.randn(1, 16, 2, 16, 16), text=TEXT)
        assert set(calls) == {64}
    finally:
        backends._sage_keys_multiple.cache_clear()


def sageattn_of_a_pack(original, q, k, v, *args, **kwargs):
    return original(q, k, v, *args, **kwargs)


def usage_counter(original, q, k, v, *args, **kwargs):
    return original(q, k, v, *args, **kwargs)


class SageAttention:
    def __call__(self, original, q, k, v, *args, **kwargs):
        return original(q, k, v, *args, **kwargs)


SAGE_OVERRIDES = [sageattn_of_a_pack, partial(sageattn_of_a_pack), SageAttention()]
OTHER_OVERRIDES = [usage_counter, partial(usage_counter)]


@pytest.mark.parametrize("installed", ["1.0.6", "2.2.0", None])
@pytest.mark.parametrize("override", SAGE_OVERRIDES + OTHER_OVERRIDES)
def test_an_override_by_sageattention_1_is_passed_over_too(pack, monkeypatch, calls, caplog, override, installed):
    """Where its names do not tell, it does the work, and the log warns of what would be wrong."""
    module = sys.modules[f"{pack.__name__}.nodes.host_attention"]
    backends = sys.modules[f"{pack.__name__}.t3.backends.registry"]
    monkeypatch.setattr(module, "installed", lambda package: installed is not None)
    monkeypatch.setattr(backends, "version", lambda package: installed)
    backends._sage_keys_multiple.cache_clear()
    model = host_models.patcher("t2v")
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    patched, _ = with_t3(pack, model)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                forward(patched, X, text=TEXT)
    finally:
        backends._sage_keys_multiple.cache_clear()
    wrong = installed == "1.0.6"
    passed_over = wrong and override in SAGE_OVERRIDES
    assert (not calls) == passed_over
    assert caplog.text.count("sageattention, as installed, is wrong for windows of") == wrong
    assert caplog.text.count("Another backend does the work instead.") == passed_over
    assert caplog.text.count("If another node's attention override uses it") == (wrong and not passed_over)
    assert caplog.text.count("attention inside windows is the one chosen by") == (not passed_over)


def test_a_backend_is_chosen_for_all_keys_that_a_window_meets(pack, monkeypatch):
    module = sys.modules[f"{pack.__name__}.nodes.forward_pass"]
    t3, asked = sys.modules[f"{pack.__name__}.t3"], []
    choose = module.choose
    monkeypatch.setattr(module, "choose", lambda name, s: asked.append(s) or choose(name, s))
    settings, situation = module.Settings(t3.Plan.preset("wan2.1-4k")), module.Situation(X.device, X.dtype, 128)
    for prefix, suffix in ((0, 0), (2, 4)):
        layout = module.wan.Layout(t3.Grid(3, 5, 7), prefix, suffix)
        module._backend(settings, {}, situation, layout, [t3.Partition(1, 5, 2)], print)
        assert asked[-1].windows == (12 + prefix + suffix, 9 + prefix + suffix)


def plan_of_frames(pack):
    from host_runs import plan_of

    return plan_of(pack, [["each", 1, 1]], (2, 8, 8))
