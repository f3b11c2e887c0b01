"""A file that `t3.convert` merged, opened by ComfyUI: the parameters of the arithmetic by hand, for every kind."""

from __future__ import annotations

import host_models
import pytest
import torch
from host_weights import KINDS, state
from weights_fixtures import one_thread as one_thread
from weights_fixtures import save
from weights_kinds import adapter, by_hand, close, full_tensors

from t3 import convert


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_opens_what_was_merged(pack, tmp_path, kind):
    import comfy.sd

    want, arguments = state(kind), []
    base = save(tmp_path / "base.safetensors", full_tensors(kind, "comfyui", want), host_models.metadata(24))
    for i, (option, form, strength) in enumerate((("--t3-weights", "mixed", 1.5), ("--lora", "lokr factored", -0.5))):
        tensors, deltas = adapter(kind, form, "kohya", seed=10 + 500 * i, state=want)
        path = save(tmp_path / f"{i}.safetensors", tensors)
        arguments += [option, f"{path}:{strength}"]
        want = by_hand(want, deltas, strength)
    out = str(tmp_path / "out.safetensors")
    assert convert.main([str(base), *arguments, "--out", out]) == 0
    patcher = comfy.sd.load_diffusion_model(out, model_options={"dtype": torch.float32})
    have = dict(patcher.model.diffusion_model.named_parameters())
    assert have.keys() == want.keys()
    for name in want:
        close(have[name].detach(), want[name])
