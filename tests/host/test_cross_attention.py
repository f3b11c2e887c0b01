"""Cross-attention by what attends windows, where nobody chose an attention: the host's own result, to rounding."""

from __future__ import annotations

import dataclasses
import logging
import sys

import host_models
import pytest
import torch
from host_blocks import DIM, HEADS, both, check, inputs, make_block, patch, random
from host_runs import forward, with_t3

TEXT, IMAGE = 9, 4  # tokens


@pytest.fixture
def asked():
    """`(queries, keys)` that `ours` was asked for against other tokens than a window's own."""
    return []


@pytest.fixture
def ours(t3, asked):
    """A backend of ours."""
    backends = sys.modules[f"{t3.pack.__name__}.t3.backends"]

    def attend(q, k, v, scale):
        if k.shape[1] in (TEXT, IMAGE):
            asked.append((q.shape[1], k.shape[1]))
        return backends.BACKENDS["sdpa"].attend(q, k, v, scale)

    return dataclasses.replace(backends.BACKENDS["sdpa"], name="ours", attend=attend)


CHUNKS = [32] * 5 + [8]
CASES = {
    "text": ({}, {}, [(n, TEXT) for n in CHUNKS]),
    "batch of two": ({"batch": 2}, {}, [(n, TEXT) for n in [16] * 10 + [8]]),
    "float32, strided": ({"dtype": torch.float32, "strided": True}, {}, None),
    "tokens beside the grid": ({"prefix": 5, "suffix": 2}, {"prefix": 5, "suffix": 2}, None),
    "image": ({"image": IMAGE}, {}, [(n, keys) for n in CHUNKS for keys in (IMAGE, TEXT)]),
    "image, batch of two": ({"image": IMAGE, "batch": 2}, {}, None),
}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_host_s(t3, ours, asked, case, lean):
    changes, beside, expected = CASES[case]
    block = make_block(
        "i2v_cross_attn" if "image" in changes else "t2v_cross_attn", changes.get("dtype", torch.float64)
    )
    share = t3.memory.Share(1) if lean else None
    options = {"kept": 1}
    out, plain, _ = both(t3, block, inputs(**changes), options, share=share, backend=ours, **beside)
    check(out, plain)
    assert asked == (expected or asked) and len(asked) > 2
    assert options == {"kept": 1}, "the host's options were written to"


def test_a_last_chunk_of_one_token_does_not_meet_kernels_made_for_windows(t3, ours, asked):
    out, plain, _ = both(t3, make_block(), inputs(prefix=25), backend=ours, prefix=25)
    check(out, plain)
    assert out.shape[1] % 32 == 1 and [n for n, _ in asked] == [32] * 6


def test_an_override_is_called_and_ours_is_not(t3, ours, asked):
    """Even where a backend was chosen for windows."""
    seen = []

    def override(original, q, k, v, *args, **kwargs):
        seen.append(k.shape[1])
        return original(q * 0.5, k, v, *args, **kwargs)

    out, plain, _ = both(t3, make_block(), inputs(), {"optimized_attention_override": override}, backend=ours)
    check(out, plain)
    assert TEXT in seen and not asked


def test_a_launch_flag_is_respected(t3, ours, asked, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "use_split_cross_attention", True)
    check(*both(t3, make_block(), inputs(), backend=ours)[:2])
    assert not asked


def test_the_host_s_attention_of_windows_is_the_host_s_of_text(t3, ours, asked):
    nodes = t3.nodes
    block, arguments = make_block(), inputs()
    patched = patch(t3, block, backend=None)
    with torch.no_grad():
        out = patched.forward(**arguments, transformer_options={})
        patched.installation.current = dataclasses.replace(patched.installation.current, backend=ours)
        check(patched.forward(**arguments, transformer_options={}), out)
        count = len(asked)
        patched.installation.current = None
        patched.forward(**arguments, transformer_options={})
    assert count == len(asked) == 6 and nodes.host_attention.chosen_by_user({}) is None


def test_patches_after_cross_attention_work_with_it(t3, ours, asked):
    options = {"patches": {"attn2_patch": [lambda args: args["x"] * 1.5]}}
    check(*both(t3, make_block(), inputs(batch=2), options, backend=ours)[:2])
    assert asked == [(168, TEXT)]


def test_a_foreign_cross_attention_sees_the_options_as_they_are(t3, ours, asked):
    block = make_block()
    cross, seen = block.cross_attn, []

    def forward(x, context, context_img_len=None, transformer_options=None):
        seen.append(transformer_options)
        return type(cross).forward(cross, x, context)

    cross.forward = forward
    options = {"mine": object()}
    check(*both(t3, block, inputs(), options, backend=ours)[:2])
    assert seen == [options, options] and not asked


@pytest.mark.parametrize("what", ["8 bits", "scores"])
def test_what_nobody_asked_for_beyond_windows_is_not_taken_and_it_is_said(t3, ours, asked, caplog, what):
    change = {"exact": False} if what == "8 bits" else {"scores": True}
    out, plain, _ = both(t3, make_block(), inputs(), backend=dataclasses.replace(ours, **change))
    check(out, plain)
    assert not asked and caplog.text.count("cross-attention is computed by sdpa: ours") == 1


def test_what_is_more_than_plain_attention_is_left_to_the_host(t3, ours, asked, caplog):
    import comfy.ldm.wan.model as wan

    said = t3.nodes.patch.Installation(settings=None).say
    options = t3.nodes.host_attention.with_ours({}, ours, said)
    q, k = random(2, 5, DIM, seed=1), random(2, TEXT, DIM, seed=2)
    mask = torch.ones(5, TEXT, dtype=torch.bool).tril()
    for more in ({"mask": mask}, {"mask": mask}, {}):
        expected = wan.optimized_attention(q, k, k, heads=HEADS, **more)
        check(wan.optimized_attention(q, k, k, heads=HEADS, transformer_options=options, **more), expected)
    assert asked == [(5, TEXT)] and caplog.text.count("the host's own: it is called with mask") == 1


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_whole_model(t3, monkeypatch, kind, caplog):
    """As the node sets it up: ours by default, the host's once a launch flag chose, the same result."""
    from comfy.cli_args import args

    seen, module = [], t3.text_attention
    original = module.attend_text
    monkeypatch.setattr(module, "attend_text", lambda *a: seen.append(a[1].shape[1]) or original(*a))
    model = host_models.patcher(kind, num_layers=2)
    generator = torch.Generator().manual_seed(4)
    diffusion_model = model.model.diffusion_model
    x = torch.randn(1, diffusion_model.out_dim, 6, 12, 12, generator=generator)
    text = torch.randn(1, 7, 48, generator=generator)
    conds = host_models.conditions("image" if kind == "i2v" else "", diffusion_model, 1, (6, 12, 12), generator)
    out = forward(with_t3(t3.pack, model)[0], x, text=text, **conds)
    assert set(seen) == ({7, 257} if kind == "i2v" else {7})
    seen.clear()
    monkeypatch.setattr(args, "use_pytorch_cross_attention", True)
    with caplog.at_level(logging.WARNING):
        theirs = forward(with_t3(t3.pack, model)[0], x, text=text, **conds)
    assert not seen and (out - theirs).norm() < 1e-5 * theirs.norm()
