"""The plan of a run: asked for, carried by weights, or the released one; and what is said about it."""

import pytest
import torch
from safetensors.torch import load_file
from small_models import TRANSFORMER, build
from weights_fixtures import save

from t3.errors import T3Error
from t3.plan import Grid, Plan
from t3.plan_choice import resolve_plan
from t3.sources import find_sources

WIDTH = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
ONE, TWO = (Plan(name, Grid(2, 4, 6), ((1, 2, n),)) for n, name in ((1, "one"), (2, "two")))


def weights(folder, name, plan=None):
    tensors = {"diffusion_model.blocks.0.self_attn.q.diff": torch.zeros(WIDTH, WIDTH)}
    return str(save(folder / name, tensors, {"t3.plan": plan.to_json()} if plan else None))


def settle(model, text="auto", **files):
    sources = find_sources(model=str(model), **files)
    plan, reason = resolve_plan(text, sources)
    return plan, reason, sources.tuned


def test_weights_bring_their_plan(tmp_path, tiny_model):
    tuned, style = weights(tmp_path, "tuned.safetensors", ONE), weights(tmp_path, "style.safetensors")
    assert settle(tiny_model, t3_weights=[tuned], loras=[style]) == (ONE, "carried by the weights", "yes")
    assert settle(tiny_model, loras=[style, f"{tuned}:0.5"]) == (ONE, "carried by the LoRA tuned.safetensors", "yes")
    plan, reason, tuned = settle(tiny_model, loras=[style])
    assert plan.name == "wan2.1-4k" and "released plan" in reason and tuned == "cannot tell"


def test_what_is_not_applied_has_no_say(tmp_path, tiny_model):
    """At strength 0 the weights are the base's: not tuned, so that the warning of noise is due."""
    one, two = weights(tmp_path, "one.safetensors", ONE), weights(tmp_path, "two.safetensors", TWO)
    for files in ({"t3_weights": [f"{one}:0"]}, {"loras": [f"{one}:0"]}):
        plan, _, tuned = settle(tiny_model, **files)
        assert plan.name == "wan2.1-4k" and tuned == "cannot tell"
    assert settle(tiny_model, t3_weights=[f"{one}:0"], loras=[two])[0] == TWO
    assert find_sources(model=str(tiny_model), loras=[f"{one}:0"]).loras[0].strength == 0


def test_a_diffusers_folder_brings_its_plan(tmp_path):
    folder = build("t2v", tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert settle(folder)[2] == "cannot tell"
    save(file, load_file(file), {"t3.plan": ONE.to_json()})
    assert settle(folder) == (ONE, "carried by the weights", "yes")
    lora = weights(tmp_path, "tuned.safetensors", TWO)
    assert settle(folder, loras=[lora])[:2] == (TWO, "carried by the LoRA tuned.safetensors")


def test_what_is_asked_for_wins_and_is_told(tmp_path, tiny_model):
    tuned = weights(tmp_path, "tuned.safetensors", ONE)
    plan, reason, _ = settle(tiny_model, "dense", loras=[tuned])
    assert plan.name == "dense"
    assert reason == "as asked, instead of 'one', carried by the LoRA tuned.safetensors"
    (tmp_path / "one.json").write_text(ONE.to_json())
    assert "instead" not in settle(tiny_model, str(tmp_path / "one.json"), t3_weights=[tuned])[1]


def test_two_plans_ask_for_a_choice(tmp_path, tiny_model):
    files = {
        "t3_weights": [weights(tmp_path, "a.safetensors", ONE)],
        "loras": [weights(tmp_path, "b.safetensors", TWO)],
    }
    with pytest.raises(T3Error, match=r"a\.safetensors and b\.safetensors carry different plans \('one' and 'two'\)"):
        settle(tiny_model, **files)
    assert settle(tiny_model, "dense", **files)[0].name == "dense"


def test_two_files_of_one_plan_agree(tmp_path, tiny_model):
    files = {
        "t3_weights": [weights(tmp_path, "a.safetensors", ONE)],
        "loras": [weights(tmp_path, "b.safetensors", ONE)],
    }
    assert settle(tiny_model, **files)[:2] == (ONE, "carried by the weights")


@pytest.mark.parametrize("option", ["t3_weights", "loras"])
def test_a_broken_plan_stops_before_anything_is_loaded(tmp_path, tiny_model, option):
    path = save(tmp_path / "a.safetensors", {"blocks.0.norm3.diff": torch.zeros(WIDTH)}, {"t3.plan": "{}"})
    with pytest.raises(T3Error, match=r"a\.safetensors: its metadata entry `t3\.plan` cannot be used"):
        find_sources(model=str(tiny_model), **{option: [str(path)]})
