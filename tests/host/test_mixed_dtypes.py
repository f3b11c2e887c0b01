"""Weights that the host keeps in bfloat16 while it computes in float16, in copies made without dynamic VRAM: the host
fails there, and with T3 it does not."""

from __future__ import annotations

import host_models
import pytest
import torch
from host_runs import forward, plan_of
from host_runs import with_t3 as with_a_plan

MIXED = "mat1 and mat2 must have the same dtype, but got Half and BFloat16"


@pytest.fixture(params=["in the dtype of the file", "cast when loaded"])
def load(pack, request, monkeypatch):
    """Loads a bfloat16 file as the host does for TorchCompileModel: with dynamic VRAM on, and with it off."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.sd

    # As on a card that is faster in float16, which Wan models then take.
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *args, **kwargs: True)
    state = {key: x.bfloat16() for key, x in host_models.dit_state_dict(num_layers=1).items()}

    def load(disable_dynamic=True):
        with monkeypatch.context() as loading:
            loading.setattr(comfy.memory_management, "aimdo_enabled", load.mixed)
            model = comfy.sd.load_diffusion_model_state_dict(
                dict(state), metadata=host_models.metadata(), disable_dynamic=disable_dynamic
            )
        model.cached_patcher_init = (load, ())
        return model

    load.mixed = request.param == "in the dtype of the file"
    return load


def with_t3(pack, model):
    """Two groupings of windows in the one layer there is."""
    return with_a_plan(pack, model, custom_plan=plan_of(pack, [[1, 2, 3]]))


def inputs():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 16, 6, 12, 12, generator=generator), torch.randn(1, 7, 48, generator=generator)


def run(model):
    x, text = inputs()
    return forward(model, x, text=text)


def test_the_host_alone(load):
    """What the host does by itself. Where this fails, a newer host has mended it, and `mixed_dtypes` may go."""
    model = load()
    assert model.model.get_dtype_inference() == torch.float16
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    assert linear.weight.dtype == (torch.bfloat16 if load.mixed else torch.float16)
    if load.mixed:
        with pytest.raises(RuntimeError, match=MIXED):
            run(model)
    else:
        assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("order", ["T3 on the copy", "a copy of T3"])
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_t3_has_weights_cast(pack, load, caplog, order, compiled):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    wanted, load.mixed = load.mixed, False
    whole = run(with_t3(pack, load())[0])
    load.mixed = wanted
    if order == "T3 on the copy":
        model, report = with_t3(pack, load())
    else:
        first, _ = with_t3(pack, load())
        first.force_cast_weights = False  # as a patcher with dynamic VRAM, which needs no switch
        caplog.clear()
        model = first.clone(force_deepcopy=True)
        report = caplog.text
        assert model.model is not first.model
    assert ("ComfyUI kept weights in bfloat16 and computes in float16" in report) == load.mixed
    assert model.force_cast_weights == load.mixed
    if compiled:
        torch._dynamo.reset()
        set_torch_compile_wrapper(model, backend="aot_eager")
    # The same weights, cast earlier or later. Compiled code may round elsewhere, in float16.
    found = run(model)
    assert torch.equal(found, whole) if not compiled else (found - whole).norm() < 2**-8 * whole.norm()


def test_a_model_that_was_loaded_without_is_loaded_anew(pack, load):
    """As where somebody tried without T3 before, and the failed model stayed loaded."""
    model = load()
    if load.mixed:
        with pytest.raises(RuntimeError, match=MIXED):
            run(model)
    patched, _ = with_t3(pack, model)
    assert torch.isfinite(run(patched)).all()
    assert not model.force_cast_weights
    assert (model.patches_uuid == patched.patches_uuid) != load.mixed


def test_models_that_cast_for_themselves_are_left_alone(pack):
    """Layers of other operations, and those of the same dtype."""
    model = host_models.patcher("t2v", num_layers=2)
    patched, report = with_t3(pack, model)
    assert not patched.force_cast_weights and "kept weights" not in report
    model.set_model_compute_dtype(torch.bfloat16)
    before = model.patches_uuid
    patched, report = with_t3(pack, model)
    assert patched.patches_uuid == before and "kept weights" not in report
