"""What ComfyUI's own LoRA loader makes of an extracted file: the tuned model, with nothing left unread."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_convert_host import host_keys
from test_extract import RANK, tuned_of
from weights_fixtures import one_thread as one_thread
from weights_kinds import KINDS, kind_state

from t3.weights.extract import extract


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_reads_all_of_it(pack, tmp_path, caplog, kind, dialect):
    import comfy.lora

    base = kind_state(kind)
    tuned = tuned_of(base)
    path = tmp_path / "lora.safetensors"
    extract(base, tuned, path, rank=RANK, dtype="float32", dialect=dialect)
    keys = host_keys(base)
    if dialect == "kohya":  # as `model_lora_keys_unet` lists them beside the others; tables have no such name
        keys = {f"lora_unet_{k.removeprefix('diffusion_model.').replace('.', '_')}": v for k, v in keys.items()}
    loaded = comfy.lora.load_lora(load_file(path), keys)
    assert sorted(loaded) == sorted(f"diffusion_model.{name}" for name in base)
    assert "lora key not loaded" not in caplog.text
    for key, patch in loaded.items():
        name = key.removeprefix("diffusion_model.")
        have = comfy.lora.calculate_weight(
            [(1.0, patch, 1.0, None, None)], base[name].double(), key, intermediate_dtype=torch.float64
        )
        assert (have - tuned[name]).norm() <= 1e-6 * (tuned[name] - base[name]).norm() + 1e-7 * base[name].norm()
