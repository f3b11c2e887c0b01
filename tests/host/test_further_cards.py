"""T3 with ComfyUI's MultiGPU CFG Split: each card has a model of its own, and they run at the same time.

Two names of the CPU stand for two cards.
"""

from __future__ import annotations

from collections import Counter

import host_models
import pytest
import torch
from host_runs import sample, with_t3

LATENT = (1, 16, 6, 12, 12)
STEPS = 2


@pytest.fixture
def dit(pack, tmp_path):
    """A model by the host's loader, which such clones need."""
    import comfy.sd

    path = host_models.write_dit(tmp_path / "dit.safetensors")
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


@pytest.fixture
def split(monkeypatch):
    """What the host's node does with two cards: `split(model)`."""
    import comfy.model_management
    import comfy.multigpu

    cards = [torch.device("cpu"), torch.device("cpu:0")]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: cards)
    return lambda model: comfy.multigpu.create_multigpu_deepclones(model, 2)


@pytest.mark.parametrize("order", ["before", "after"])
def test_every_card_runs_windows(pack, dit, split, monkeypatch, order):
    """The same result as on one card, with T3 before or after the split; for each model an installation of its own."""
    latent = torch.zeros(LATENT)
    alone = sample(with_t3(pack, dit)[0], latent, steps=STEPS)
    dense = sample(dit, latent, steps=STEPS)
    patch = pack.nodes.patch.T3SelfAttention
    windows, original = Counter(), patch._windowed

    def counting(self, *args):
        windows[self.installation] += 1
        return original(self, *args)

    monkeypatch.setattr(patch, "_windowed", counting)
    model = split(with_t3(pack, dit)[0]) if order == "before" else with_t3(pack, split(dit))[0]
    assert len(model.get_additional_models_with_key("multigpu")) == 1
    both = sample(model, latent, steps=STEPS)
    assert list(windows.values()) == [5 * STEPS, 5 * STEPS]
    assert (both - alone).norm() < 1e-5 * alone.norm()
    assert (both - dense).norm() > 0.01 * dense.norm()


def test_clones_for_further_cards_have_patches_of_their_own(pack, dit):
    """The host matches such clones anew before every sampling."""
    patched, _ = with_t3(pack, dit)
    patched.set_additional_models("multigpu", [patched.deepclone_multigpu(new_load_device=torch.device("cpu"))])
    patched.match_multigpu_clones()
    (clone,) = patched.get_additional_models_with_key("multigpu")
    assert clone.model is not patched.model
    installations = set()
    for model in (patched, clone):
        for i, block in enumerate(model.model.diffusion_model.blocks):
            patch = model.object_patches[f"diffusion_model.blocks.{i}.self_attn.forward"].__self__
            assert patch.module is block.self_attn
            installations.add(patch.installation)
    assert len(installations) == 2
