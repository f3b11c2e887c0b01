"""Running patched models in this process: one forward pass with a patcher's wrappers, or a whole sampling."""

from __future__ import annotations

from typing import Any

import torch

# Small counts that cut every axis, local and strided windows differing in all layers but the first.
COUNTS = [["each", 1, 1], [1, 2, 3], [1, 3, 2], [2, 2, 1], [3, 1, 2]]


def plan_of(pack, layers=COUNTS, grid=(6, 6, 6)):
    """A plan of the pack's own `t3`."""
    import sys

    return sys.modules[f"{pack.__name__}.t3"].Plan("test", grid, tuple(layers))


def with_t3(pack, patcher, **changes: Any):
    """`patcher` through the T3 Attention node; returns the patched clone and the report."""
    inputs = {
        "plan": "auto",
        "backend": "auto",
        "memory": "auto",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "dense_blocks": "",
        "verbose": False,
        "custom_plan": plan_of(pack),
        **changes,
    }
    return pack.nodes.attention.T3Attention.execute(patcher, **inputs).result


def transformer_options(patcher) -> dict:
    """What the sampler hands to `apply_model`: the patcher's options, with its wrappers among them."""
    from comfy.patcher_extension import copy_nested_dicts

    options = dict(patcher.model_options.get("transformer_options", {}))
    options["wrappers"] = copy_nested_dicts(patcher.wrappers)
    return options


def forward(patcher, x: torch.Tensor, *, timestep: float = 0.9, text: torch.Tensor, **conds: Any) -> torch.Tensor:
    """One `apply_model` with the patches in place, as the sampler does it; the model is left as it was found."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    options = {**transformer_options(patcher), **conds.pop("options", {})}
    sigma = torch.full((x.shape[0],), timestep)
    with torch.inference_mode():
        return patcher.model.apply_model(x, sigma, c_crossattn=text, transformer_options=options, **conds)


def sample(patcher, latent: torch.Tensor, *, steps: int = 2, cfg: float = 3.0, seed: int = 1, conds=None, **kwargs):
    """A whole sampling as KSampler does it (euler, simple) with random text; returns the latents."""
    import comfy.sample

    positive, negative = conds or text_conds(patcher)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        patcher, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=seed, **kwargs
    )


def text_conds(patcher, **extra: Any):
    """Positive and negative conditions of random text."""
    width = patcher.model.diffusion_model.text_dim
    texts = [torch.randn(1, 7, width, generator=torch.Generator().manual_seed(s)) for s in (11, 12)]
    return [[[text, dict(extra)]] for text in texts]
