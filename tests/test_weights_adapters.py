"""Applying weights: every dialect and form against arithmetic done by hand, and against PEFT and diffusers."""

import json

import peft
import pytest
import torch
from diffusers import WanPipeline

from t3.errors import T3Error
from t3.plan import Plan
from t3.weights import apply_weights, identify, open_weights
from tests.weights_fixtures import (
    TINY,
    TINY_I2V,
    inputs,
    names_for,
    one_thread,  # noqa: F401
    original_state,
    save,
    tiny_transformer,
)

NAMES = names_for(TINY)
DIALECTS = {
    "original": lambda name: name,
    "comfyui": lambda name: f"diffusion_model.{name}",
    "comfyui long": lambda name: f"model.diffusion_model.{name}",
    "diffsynth": lambda name: f"pipe.dit.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "diffusers": lambda name: f"transformer.{theirs(name)}",
    "diffusers bare": lambda name: theirs(name),
    "peft diffusers": lambda name: f"base_model.model.{theirs(name)}",
    "kohya diffusers": lambda name: "lora_unet_" + theirs(name).replace(".", "_"),
}
LABELS = {
    "comfyui long": "comfyui",
    "diffusers bare": "diffusers",
    "peft diffusers": "peft",
    "kohya diffusers": "kohya",
}
# down, up and alpha suffixes; alpha None leaves the scale at one.
LORA_FORMS = {
    "lora_A": ("lora_A.weight", "lora_B.weight", None),
    "default": ("lora_A.default.weight", "lora_B.default.weight", None),
    "lora_down": ("lora_down.weight", "lora_up.weight", 3.0),
}
MODULES = ["blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "blocks.0.ffn.2", "time_projection.1"]
RANK = 4


def theirs(name):
    """The diffusers name of an original module or bare parameter."""
    return NAMES[name] if name in NAMES else NAMES[f"{name}.weight"].removesuffix(".weight")


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def lora(base, modules, suffixes, spell=lambda name: name, seed=5):
    """LoRA tensors for some modules, and what each adds to which parameter at strength one."""
    down, up, alpha = suffixes
    tensors, deltas = {}, {}
    for i, module in enumerate(modules):
        shape = base[f"{module}.weight"].shape
        a, b = noise(RANK, *shape[1:], seed=seed + i), noise(shape[0], RANK, seed=seed + 50 + i)
        scale = 1.0 if alpha is None else (alpha + i) / RANK
        tensors[f"{spell(module)}.{down}"], tensors[f"{spell(module)}.{up}"] = a, b
        if alpha is not None:
            tensors[f"{spell(module)}.alpha"] = torch.tensor(alpha + i)
        deltas[f"{module}.weight"] = scale * (b.double() @ a.double().flatten(1)).reshape(shape)
    return tensors, deltas


def diffs(base, spell=lambda name: name, seed=200):
    """Diffs of a linear layer with bias, norms, modulation tables and the patch embedding."""
    tensors, deltas = {}, {}
    places = [("blocks.0.self_attn.k", "diff", "blocks.0.self_attn.k.weight")]
    places += [("blocks.0.self_attn.k", "diff_b", "blocks.0.self_attn.k.bias")]
    places += [("blocks.1.self_attn.norm_q", "diff", "blocks.1.self_attn.norm_q.weight")]
    places += [("blocks.1.norm3", "diff", "blocks.1.norm3.weight"), ("blocks.1.norm3", "diff_b", "blocks.1.norm3.bias")]
    places += [("blocks.0.modulation", "diff", "blocks.0.modulation"), ("head.modulation", "diff", "head.modulation")]
    places += [("patch_embedding", "diff", "patch_embedding.weight"), ("head.head", "diff_b", "head.head.bias")]
    for i, (module, suffix, target) in enumerate(places):
        tensors[f"{spell(module)}.{suffix}"] = noise(*base[target].shape, seed=seed + i)
        deltas[target] = tensors[f"{spell(module)}.{suffix}"].double()
    return tensors, deltas


def check(model, before, deltas, strength):
    """Every parameter equals base + strength * delta; the others are bit for bit what they were."""
    after = original_state(model)
    assert after.keys() == before.keys()
    for name, base in before.items():
        if name in deltas and strength != 0:
            want = base.double() + strength * deltas[name]
            torch.testing.assert_close(after[name].double(), want, rtol=1e-6, atol=1e-6)
            assert not torch.equal(after[name], base)
        else:
            assert torch.equal(after[name], base), name


@pytest.mark.parametrize("form", [*LORA_FORMS, "diff", "mixed"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_and_form(tmp_path, dialect, form):
    model, spell = tiny_transformer(), DIALECTS[dialect]
    before = original_state(model)
    tensors, deltas = {}, {}
    if form != "diff":
        tensors, deltas = lora(before, MODULES, LORA_FORMS.get(form, LORA_FORMS["lora_A"]), spell)
    if form in ("diff", "mixed"):
        for into, more in zip((tensors, deltas), diffs(before, spell), strict=True):
            into.update(more)
    file = open_weights(save(tmp_path / "a.safetensors", tensors, {"ss_tag": "x"}))
    found = identify(file)
    assert found.problem is None and found.component == "dit"
    assert sorted(found.matched) == sorted(tensors) and not found.unused and not found.refused
    report = apply_weights(model, file, 0.75)
    assert report.form == found.form == {"diff": "diff", "mixed": "lora+diff"}.get(form, "lora")
    bare = dialect in ("original", "diffusers bare")
    assert report.dialect == ("peft" if form == "default" and bare else LABELS.get(dialect, dialect))
    assert (report.matched, sorted(report.changed)) == (len(tensors), sorted(deltas))
    check(model, before, deltas, 0.75)


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5, 1.5])
@pytest.mark.parametrize("form", ["lora", "diff", "full"])
def test_strengths(tmp_path, form, strength):
    model = tiny_transformer()
    before = original_state(model)
    if form == "full":
        tensors = original_state(tiny_transformer(seed=1))
        deltas = {name: tensors[name].double() - before[name].double() for name in before}
    else:
        tensors, deltas = lora(before, MODULES, LORA_FORMS["lora_down"]) if form == "lora" else diffs(before)
    report = apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), strength)
    check(model, before, deltas, strength)
    assert bool(report.changed) == (strength != 0)
    assert f"strength {strength:g}" in report.describe()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strengths_that_are_no_numbers(tmp_path, strength):
    model = tiny_transformer()
    file = open_weights(save(tmp_path / "a.safetensors", lora(original_state(model), MODULES, LORA_FORMS["lora_A"])[0]))
    with pytest.raises(ValueError, match="no finite number"):
        apply_weights(model, file, strength)


def test_full_weights_replace_exactly(tmp_path):
    tuned = original_state(tiny_transformer(seed=1))
    model = tiny_transformer()
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tuned.items()}
    plan = Plan.preset("wan2.1-4k").to_json()
    report = apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors, {"t3.plan": plan})))
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in original_state(model).items())
    assert (report.form, report.plan, report.tuned) == ("full", plan, "yes")


def test_two_stacked(tmp_path):
    model = tiny_transformer()
    before = original_state(model)
    tensors, first = lora(before, MODULES, LORA_FORMS["lora_down"], seed=5)
    more, second = lora(before, MODULES[:2], LORA_FORMS["lora_A"], DIALECTS["diffusers"], seed=300)
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 0.5)
    apply_weights(model, open_weights(save(tmp_path / "b.safetensors", more)), -2.0)
    summed = {name: 0.5 * first[name] - 2.0 * second.get(name, 0 * first[name]) for name in first}
    check(model, before, summed, 1.0)


def test_bfloat16_rounds_once(tmp_path):
    model = tiny_transformer(dtype=torch.bfloat16)
    before = original_state(model)
    tensors, _ = lora(before, MODULES, LORA_FORMS["lora_A"])
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 1.0)
    after = original_state(model)
    for module in MODULES:
        a, b = tensors[f"{module}.lora_A.weight"].flatten(1), tensors[f"{module}.lora_B.weight"]
        base = before[f"{module}.weight"]
        assert torch.equal(after[f"{module}.weight"], (base.float() + b @ a).bfloat16())


def test_a_float64_model_is_changed_in_float64(tmp_path):
    model = tiny_transformer(dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-10
    before = original_state(model)
    tensors, deltas = lora(before, MODULES[:1], LORA_FORMS["lora_A"])
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 0.5)
    after = original_state(model)
    for name, delta in deltas.items():
        torch.testing.assert_close(after[name], before[name] + 0.5 * delta, rtol=1e-14, atol=1e-14)


def test_dora_by_columns(tmp_path):
    """One length for each column, as kohya's tools can write it, of a weight that is not square."""
    model, module = tiny_transformer(), "blocks.1.ffn.0"
    before = original_state(model)
    tensors, deltas = lora(before, [module], LORA_FORMS["lora_down"], DIALECTS["kohya"])
    lengths = noise(1, 128, seed=9).abs() + 0.5
    tensors[f"{DIALECTS['kohya'](module)}.dora_scale"] = lengths
    base = before[f"{module}.weight"].double()
    merged = base + deltas[f"{module}.weight"]
    deltas = {f"{module}.weight": lengths.double() * merged / merged.norm(dim=0, keepdim=True) - base}
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 0.5)
    check(model, before, deltas, 0.5)


def test_names_that_read_both_ways_are_the_original_ones(tmp_path):
    file = open_weights(save(tmp_path / "a.safetensors", {"patch_embedding.diff_b": torch.ones(128)}))
    assert identify(file).naming == "original"


def test_lora_on_the_patch_convolution(tmp_path):
    model = tiny_transformer()
    before = original_state(model)
    tensors, deltas = lora(before, ["patch_embedding"], LORA_FORMS["lora_down"], DIALECTS["kohya"])
    up = "lora_unet_patch_embedding.lora_up.weight"
    tensors[up] = tensors[up][..., None, None, None]
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)))
    check(model, before, deltas, 1.0)


def test_spellings_seen_in_the_wild(tmp_path):
    """A double underscore (VideoX-Fun), an alpha stored as an integer, and LoRA names of older diffusers."""
    model = tiny_transformer()
    before = original_state(model)
    tensors, deltas = lora(before, MODULES[:1], LORA_FORMS["lora_down"], lambda m: "lora_unet__" + m.replace(".", "_"))
    tensors["lora_unet__blocks_0_self_attn_q.alpha"] = torch.tensor(3)
    for suffixes in (("lora.down.weight", "lora.up.weight", None), ("lora_A", "lora_B", None)):
        more, others = lora(before, [MODULES[1 + ("lora_A" in suffixes)]], suffixes, seed=40)
        apply_weights(model, open_weights(save(tmp_path / "b.safetensors", more)))
        deltas |= others
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)))
    check(model, before, deltas, 1.0)


def test_lora_bias_is_scaled_like_its_lora(tmp_path):
    model = tiny_transformer()
    before = original_state(model)
    tensors, deltas = lora(before, MODULES[:1], ("lora_A.weight", "lora_B.weight", 3.0))
    bias = noise(128, seed=9)
    tensors["blocks.0.self_attn.q.lora_B.bias"] = bias
    deltas["blocks.0.self_attn.q.bias"] = 3.0 / RANK * bias.double()
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 0.5)
    check(model, before, deltas, 0.5)


def test_lora_and_diff_on_one_parameter_add_up(tmp_path):
    model = tiny_transformer()
    before = original_state(model)
    tensors, deltas = lora(before, MODULES[:1], LORA_FORMS["lora_A"])
    tensors["blocks.0.self_attn.q.diff"] = noise(128, 128, seed=9)
    deltas["blocks.0.self_attn.q.weight"] = (
        deltas["blocks.0.self_attn.q.weight"] + tensors["blocks.0.self_attn.q.diff"].double()
    )
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)), 1.5)
    check(model, before, deltas, 1.5)


def test_image_model_parts(tmp_path):
    model = tiny_transformer(TINY_I2V)
    before = original_state(model, TINY_I2V)
    tensors, deltas = lora(before, ["blocks.0.cross_attn.k_img", "img_emb.proj.1"], LORA_FORMS["lora_A"])
    tensors["blocks.1.cross_attn.norm_k_img.diff"] = noise(128, seed=1)
    deltas["blocks.1.cross_attn.norm_k_img.weight"] = tensors["blocks.1.cross_attn.norm_k_img.diff"].double()
    apply_weights(model, open_weights(save(tmp_path / "a.safetensors", tensors)))
    after = original_state(model, TINY_I2V)
    for name, delta in deltas.items():
        torch.testing.assert_close(after[name].double(), before[name].double() + delta, rtol=1e-6, atol=1e-6)


def peft_model(**settings):
    """A tiny transformer with a random PEFT LoRA on it."""
    model = tiny_transformer()
    config = peft.LoraConfig(r=RANK, lora_alpha=10, target_modules=["to_q", "ffn.net.2"], **settings)
    model.add_adapter(config)
    randomise_adapter(model)
    return model, config


def randomise_adapter(model):
    """Noise for every parameter that PEFT added; the lengths of DoRA stay positive."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if any(part in name for part in ("lora_", "lokr_", "hada_")):
                drawn = noise(*parameter.shape, seed=i)
                parameter.copy_(drawn.abs() + 0.5 if "magnitude" in name else drawn)


def same_output(model, other):
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(TINY)).sample, other(**inputs(TINY)).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_diffusers_keep_their_alpha_in_metadata(tmp_path, rslora):
    tuned, config = peft_model(use_rslora=rslora)
    state = peft.get_peft_model_state_dict(tuned)
    packed = {
        f"transformer.{key}": value
        for key, value in config.to_dict().items()
        if key in ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")
    }
    save(
        tmp_path / "pytorch_lora_weights.safetensors",
        {f"transformer.{key}": value for key, value in state.items()},
        {"lora_adapter_metadata": json.dumps(packed)},
    )
    model = tiny_transformer()
    apply_weights(model, open_weights(tmp_path))
    same_output(model, tuned)


def test_files_that_diffusers_itself_saves(tmp_path):
    tuned, _ = peft_model()
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(tuned),
        transformer_lora_adapter_metadata={"r": RANK, "lora_alpha": 10},
    )
    model = tiny_transformer()
    apply_weights(model, open_weights(tmp_path))
    same_output(model, tuned)


def test_folders_of_peft_keep_their_alpha_beside_the_weights(tmp_path):
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=10,
        target_modules=["to_q", "to_k"],
        # The first that fits the end of a name, cut at dots, counts; "_q" fits none. (PEFT sorts them in its files.)
        alpha_pattern={"_q": 99, "blocks.1.attn1.to_q": 2, "to_q": 7},
    )
    tuned = peft.get_peft_model(tiny_transformer(), config)
    randomise_adapter(tuned)
    tuned.save_pretrained(tmp_path)
    model = tiny_transformer()
    report = apply_weights(model, open_weights(tmp_path))
    assert report.dialect == "peft" and not report.notes
    same_output(model, tuned)
    (tmp_path / "adapter_config.json").unlink()
    assert "alpha taken to equal the rank" in apply_weights(model, open_weights(tmp_path)).describe()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_dora_of_peft(tmp_path, settings):
    """PEFT's own DoRA model gives the same video as its file through our arithmetic."""
    config = peft.LoraConfig(r=RANK, lora_alpha=10, target_modules=["to_q", "ffn.net.2"], **settings)
    tuned = peft.get_peft_model(tiny_transformer(), config)
    randomise_adapter(tuned)
    tuned.save_pretrained(tmp_path)
    model = tiny_transformer()
    report = apply_weights(model, open_weights(tmp_path))
    assert report.form == "dora" and len(report.changed) == 6
    same_output(model, tuned)


@pytest.mark.parametrize("name", ["LoKr", "LoHa"])
def test_lokr_and_loha_of_peft(tmp_path, name):
    kind = getattr(peft, f"{name}Config")
    options = {"decompose_both": True, "decompose_factor": 8} if name == "LoKr" else {}
    config = kind(r=RANK, alpha=10, target_modules=["to_q", "ffn.net.2"], **options)
    tuned = peft.get_peft_model(tiny_transformer(), config)
    randomise_adapter(tuned)
    tuned.save_pretrained(tmp_path)
    model = tiny_transformer()
    report = apply_weights(model, open_weights(tmp_path))
    assert report.form == name.lower() and not report.notes
    same_output(model, tuned)


def test_dora_settings_without_magnitudes(tmp_path):
    tensors, _ = lora(original_state(tiny_transformer()), MODULES[:1], LORA_FORMS["lora_A"], DIALECTS["peft"])
    path = save(tmp_path / "a.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "use_dora": True}))
    with pytest.raises(T3Error, match="say DoRA, but it holds no magnitudes"):
        identify(open_weights(path))


def test_reads_what_comfyui_style_files_mean_to_diffusers(tmp_path):
    """The same `diffusion_model.` file through diffusers' own loader gives the same model."""
    base = original_state(tiny_transformer())
    modules = [f"blocks.{i}.{part}" for i in range(2) for part in ("self_attn.q", "cross_attn.v", "ffn.2")]
    tensors, _ = lora(base, modules, LORA_FORMS["lora_down"], DIALECTS["comfyui"])
    path = save(tmp_path / "a.safetensors", tensors)
    ours, library = tiny_transformer(), tiny_transformer()
    apply_weights(ours, open_weights(path))
    converted = WanPipeline.lora_state_dict(str(path))
    library.load_lora_adapter(converted, prefix="transformer")
    same_output(ours, library)
