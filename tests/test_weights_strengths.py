"""Strengths and alphas that are no finite numbers: refused from the header, before a model is loaded."""

import subprocess
import sys

import pytest
import torch
from weights_fixtures import one_thread, save  # noqa: F401
from weights_kinds import kind_state

from t3.adapters import open_adapter, split_strength
from t3.errors import T3Error
from t3.weights import identify, open_weights

STEM = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{STEM}.lora_down.weight": torch.ones(4, 128), f"{STEM}.lora_up.weight": torch.ones(128, 4)}


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e999"])
def test_a_strength_is_finite(tmp_path, strength):
    config = identify(open_weights(save(tmp_path / "base.safetensors", kind_state("t2v")))).config
    path = save(tmp_path / "a.safetensors", PAIR)
    with pytest.raises(T3Error, match=rf"--lora .*: the strength '{strength}' is no finite number; 1 is the usual"):
        open_adapter(f"{path}:{strength}", "--lora", config)
    assert open_adapter(f"{path}:-0.5", "--lora", config).strength == -0.5


def test_colons_that_belong_to_a_path(tmp_path):
    assert split_strength(r"C:\a.safetensors", "--lora")[1] == 1
    (tmp_path / "a:nan").write_bytes(b"")
    assert split_strength(str(tmp_path / "a:nan"), "--lora") == (tmp_path / "a:nan", 1)


@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.tensor(float("nan")), "alpha' is nan; an alpha is a finite number"),
        (torch.tensor(float("-inf")).bfloat16(), "alpha' is -inf"),
        (torch.ones(4), r"has shape \[4\]; it has to be one number"),
        (torch.ones(1).to(torch.float8_e4m3fn), "stored as F8_E4M3; one number is read as"),
    ],
)
def test_an_alpha_is_found_before_anything_is_loaded(tmp_path, alpha, words):
    config = identify(open_weights(save(tmp_path / "base.safetensors", kind_state("t2v")))).config
    path = save(tmp_path / "a.safetensors", {**PAIR, f"{STEM}.alpha": alpha})
    with pytest.raises(T3Error, match=words):
        open_adapter(str(path), "--lora", config)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"])
def test_one_number_of_any_format(tmp_path, dtype):
    for value in (-3, 64):
        for shape in ((), (1,), (1, 1)):
            tensor = torch.full(shape, value, dtype=getattr(torch, dtype))
            assert open_weights(save(tmp_path / "a.safetensors", {"x": tensor})).number("x") == value


def test_no_torch_is_needed_for_it(tmp_path):
    base = save(tmp_path / "base.safetensors", kind_state("t2v"))
    path = save(tmp_path / "a.safetensors", {**PAIR, f"{STEM}.alpha": torch.tensor(2.0)})
    code = (
        "import sys; from t3.sources import find_merge\n"
        f"find_merge({str(base)!r}, loras=[{str(path)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
