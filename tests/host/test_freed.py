"""A model that ran with T3 is freed as one that ran without: as soon as nothing holds it, for the next model's room."""

from __future__ import annotations

import gc
import weakref

import host_models
import pytest
import torch
from host_runs import sample, with_t3


@pytest.fixture
def without_collection():
    """The host drops models by their reference count: nothing here may wait for Python to look for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def test_weights_go_when_another_model_is_loaded(pack, tmp_path, without_collection):
    import comfy.model_management
    import comfy.sd

    def load(seed):
        path = host_models.write_dit(tmp_path / f"{seed}.safetensors", seed=seed)
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})

    first = load(0)
    patched, _ = with_t3(pack, first)
    sample(patched, torch.zeros(1, 16, 6, 12, 12), steps=1)
    gc.collect()  # as the host does after a prompt
    held = [weakref.ref(parameter) for parameter in first.model.parameters()]
    del first, patched
    comfy.model_management.load_models_gpu([load(3)])
    assert not any(parameter() is not None for parameter in held)
