"""Every model kind in every dialect and form: what a file is found to be, and what it does to the weights."""

import json

import pytest
import torch
from weights_fixtures import one_thread, original_state, save, tiny_transformer  # noqa: F401
from weights_kinds import (
    DIALECTS,
    FORMS,
    FULL_PREFIXES,
    HEADLESS,
    KINDS,
    PLAIN,
    RELATIVES,
    STRENGTHS,
    adapter,
    by_hand,
    close,
    full_tensors,
    kind_state,
    loaded_state,
)

from t3.errors import T3Error
from t3.sources import find_sources
from t3.weights import apply_weights, identify, load_transformer, open_weights
from t3.weights.adapters import apply_piece

MERGE = r"t3\.convert BASE --t3-weights FILE --lora FILE --out MERGED\.safetensors"  # the way out that refusals name
FOUND_FORMS = {"lora default": "lora", "lora alpha": "lora", "lokr factored": "lokr", "mixed": "lora+diff"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_adapters(tmp_path, kind, form):
    """All dialects and strengths of one form: every key is placed, and every parameter is what the sums say."""
    state = kind_state(kind)
    for i, dialect in enumerate(DIALECTS):
        tensors, deltas = adapter(kind, form, dialect)
        file = open_weights(save(tmp_path / f"{dialect}.safetensors", tensors))
        found = identify(file)
        assert found.problem is None and not found.refused and not found.unused, dialect
        assert sorted(found.matched) == sorted(tensors)
        assert found.form == FOUND_FORMS.get(form, form)
        assert found.dialect == ("peft" if (dialect, form) == ("original", "lora default") else dialect)
        assert found.width == 128 and sorted({piece.target for piece in found.adapter.pieces}) == sorted(deltas)
        if kind in RELATIVES:
            assert (found.kind, found.model) == (kind, f"wan-{kind}")
        strength = STRENGTHS[(i + len(form)) % len(STRENGTHS)]
        want = by_hand(state, deltas, strength)
        for piece in found.adapter.pieces:
            have = apply_piece(file, piece, state[piece.target].double(), strength)
            torch.testing.assert_close(have, want[piece.target], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", [*FULL_PREFIXES, "diffusers"])
def test_whole_models(tmp_path, kind, dialect):
    state = kind_state(kind)
    extra = {"vae.conv1.weight": torch.ones(1)} if dialect == "comfyui" else {}
    path = save(tmp_path / "w.safetensors", full_tensors(kind, dialect, state) | extra)
    found = identify(open_weights(path))
    assert (found.form, found.kind, found.problem, found.refused) == ("full", kind, None, {})
    assert (found.dialect, found.naming) == (dialect.split()[0], "diffusers" if dialect == "diffusers" else "original")
    assert found.model == (f"wan-{kind}" if kind in RELATIVES else "custom")
    assert (len(found.matched), found.unused) == (len(state), list(extra)) and found.names.keys() == state.keys()
    if kind in HEADLESS:
        loaded = loaded_state(kind, load_transformer(path, dtype=torch.float32))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    else:
        takes = {"fun-control": "a control video", "fun-camera": "a camera path"}[kind]
        with pytest.raises(T3Error, match=rf"is a wan-{kind} model. It takes {takes}.*use it in ComfyUI.*{MERGE}"):
            load_transformer(path, dtype=torch.float32)
        with pytest.raises(T3Error, match=MERGE):
            find_sources(dit=[str(path)], vae="any", text_encoder="any")


@pytest.mark.parametrize(
    "prefix", ["pipe.transformer.", "dit.", "net.", "model.", "model.model.", "module.", "_orig_mod."]
)
def test_prefixes_of_bundles(tmp_path, prefix):
    state = kind_state("t2v")
    found = identify(open_weights(save(tmp_path / "w.safetensors", {prefix + name: t for name, t in state.items()})))
    assert (found.form, found.dialect, found.prefix, found.problem) == ("full", "original", prefix, None)
    assert found.names == {name: prefix + name for name in state}


@pytest.mark.parametrize("form", FORMS)
def test_vace_in_the_engine(tmp_path, form):
    """Every dialect and strength on the blocks of both kinds, their projections and the patch embedding."""
    state = kind_state("vace")
    path = save(tmp_path / "w.safetensors", full_tensors("vace", "comfyui", state))
    for i, dialect in enumerate(DIALECTS):
        model, strength = load_transformer(path, dtype=torch.float32), STRENGTHS[(i + len(form)) % len(STRENGTHS)]
        tensors, deltas = adapter("vace", form, dialect)
        report = apply_weights(model, open_weights(save(tmp_path / f"{dialect}.safetensors", tensors)), strength)
        assert sorted(report.changed) == (sorted(deltas) if strength else [])
        want = by_hand(state, deltas, strength)
        for name, have in loaded_state("vace", model).items():
            close(have, want[name])


def test_where_vace_blocks_join(tmp_path):
    """Evenly spread, unless a config.json beside the weights says where; one that cannot be is refused."""
    state = kind_state("vace")
    for name in [name for name in state if name.startswith("blocks.1.")]:  # six blocks, of which two have control
        state |= {name.replace(".1.", f".{i}.", 1): state[name] for i in range(2, 6)}
    path = save(tmp_path / "w.safetensors", state)
    config = {"_class_name": "WanVACETransformer3DModel"}
    for stated, found in ((None, [0, 3]), ([0, 5], [0, 5]), ([0, 6], None), ([1, 2], None), ([0], None)):
        if stated:
            (tmp_path / "config.json").write_text(json.dumps({**config, "vace_layers": stated}))
        if found:
            assert load_transformer(path, dtype=torch.float32).config.vace_layers == found
        else:
            with pytest.raises(T3Error, match=r"vace_layers.*2 rising numbers from 0 to 5"):
                load_transformer(path, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["fun-control", "fun-camera"])
def test_adapters_of_models_that_do_not_run_headless(tmp_path, kind):
    """Refused before anything is loaded, with where they do run."""
    tensors, _ = adapter(kind, "lora", "kohya")
    path = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(T3Error, match=rf"--lora .*is for a wan-{kind} model.*use it in ComfyUI.*{MERGE}"):
        find_sources(loras=[str(path)])


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("form", ["dora", "loha", "lokr factored", "set", "mixed"])
def test_in_the_engine(tmp_path, form, strength):
    kind = "i2v" if form == "mixed" else "t2v"
    model, state = tiny_transformer(PLAIN[kind]), kind_state(kind)
    tensors, deltas = adapter(kind, form, "kohya" if form == "lokr factored" else "comfyui")
    report = apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), strength)
    assert sorted(report.changed) == (sorted(deltas) if strength else [])
    want = by_hand(state, deltas, strength)
    for name, have in original_state(model, PLAIN[kind]).items():
        close(have, want[name])
        if name not in deltas or strength == 0:
            assert torch.equal(have, state[name])


def test_stacked(tmp_path):
    """Two files one after the other: the second sees what the first left, which matters to DoRA."""
    model, want = tiny_transformer(), kind_state("t2v")
    for i, (form, dialect, strength) in enumerate((("dora", "original", 0.5), ("lora", "diffusers", -1.5))):
        tensors, deltas = adapter("t2v", form, dialect, seed=10 + 500 * i)
        apply_weights(model, open_weights(save(tmp_path / f"{i}.safetensors", tensors)), strength)
        want = by_hand(want, deltas, strength)
    for name, have in original_state(model).items():
        close(have, want[name])


def test_tables_without_their_name(tmp_path):
    """`blocks.N.diff_m`, as lightx2v's files have it, is the block's modulation table."""
    change = torch.randn(1, 6, 128)
    path = save(tmp_path / "a.safetensors", {"diffusion_model.blocks.1.diff_m": change})
    found = identify(open_weights(path))
    assert [piece.target for piece in found.adapter.pieces] == ["blocks.1.modulation"] and found.problem is None
    model = tiny_transformer()
    apply_weights(model, open_weights(path))
    close(original_state(model)["blocks.1.modulation"], (kind_state("t2v")["blocks.1.modulation"] + change).double())


@pytest.mark.parametrize("on", ["t2v", "i2v"])
def test_adapters_of_relatives_do_not_fit_plain_models(tmp_path, on):
    tensors, _ = adapter("vace", "lora", "comfyui")
    model = tiny_transformer(PLAIN[on])
    with pytest.raises(T3Error, match=r"not in the loaded model, first 'vace_blocks\.0\.before_proj\.weight'"):
        apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)))


def test_on_a_scaled_fp8_base(tmp_path):
    """The base becomes what its scales say; adapters then apply to that."""
    state, stored = kind_state("t2v"), {}
    for name, tensor in state.items():
        stored[name] = tensor
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            stored[name] = (tensor / 0.01).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
            state[name] = stored[name].float() * 0.01
    model = load_transformer(save(tmp_path / "base.safetensors", stored), dtype=torch.float32)
    tensors, deltas = adapter("t2v", "lokr factored", "peft")
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), -0.5)
    want = by_hand(state, deltas, -0.5)
    for name, have in original_state(model).items():
        close(have, want[name])


def test_half_precision_rounds_once(tmp_path):
    state = kind_state("t2v")
    base = {name: tensor.bfloat16() for name, tensor in state.items()}
    model = load_transformer(save(tmp_path / "base.safetensors", base), dtype=torch.bfloat16)
    tensors, deltas = adapter("t2v", "loha", "comfyui")
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 1.5)
    want = by_hand({name: tensor.float() for name, tensor in base.items()}, deltas, 1.5)
    have = original_state(model)
    for name in deltas:
        off = (have[name].double() - want[name]).abs()
        assert (off <= want[name].abs() * 2.0**-8 + 1e-6).all(), name
