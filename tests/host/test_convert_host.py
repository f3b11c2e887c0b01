"""What ComfyUI's own LoRA loader makes of our conversion to its dialect: the weights of the arithmetic by hand."""

from __future__ import annotations

import pytest
import torch
from weights_fixtures import one_thread as one_thread
from weights_fixtures import save
from weights_kinds import FORMS, adapter, by_hand, kind_state

from t3.weights import identify, open_weights
from t3.weights.respell import respell
from t3.weights.spelling import dialect_of


def host_keys(state):
    """A LoRA's module -> the model's parameter, as `comfy.lora.model_lora_keys_unet` lists them for Wan."""
    keys = {}
    for name in (f"diffusion_model.{name}" for name in state):
        keys[name.removesuffix(".weight")] = name
    return keys


# DoRA is missing: for lengths of rows ComfyUI 0.30 divides by those of the base alone, where the method, LyCORIS and
# PEFT divide by those of the sum.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "dora"])
@pytest.mark.parametrize("kind", ["i2v", "vace", "fun-camera"])
def test_the_host_reads_all_of_it(pack, tmp_path, kind, form):
    import comfy.lora

    state = kind_state(kind)
    for source in ("kohya", "diffusers"):
        tensors, deltas = adapter(kind, form, source)
        file = open_weights(save(tmp_path / "a.safetensors", tensors))
        out = respell(file, identify(file), dialect_of("comfyui"))
        loaded = comfy.lora.load_lora({entry.name: entry.tensor() for entry in out.entries}, host_keys(state))
        assert sorted(loaded) == sorted(f"diffusion_model.{name}" for name in deltas)
        want = by_hand(state, deltas, 1.0)
        for key, patch in loaded.items():
            name = key.removeprefix("diffusion_model.")
            have = comfy.lora.calculate_weight(
                [(1.0, patch, 1.0, None, None)], state[name].double(), key, intermediate_dtype=torch.float64
            )
            torch.testing.assert_close(have, want[name], rtol=1e-6, atol=1e-6)
