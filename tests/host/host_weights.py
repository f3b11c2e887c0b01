"""Models of ComfyUI's for weights to be put on, files of weights in folders it knows, and what is in a model then."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import host_models
import torch
from weights_fixtures import save

# Kinds of `weights_kinds` -> of `host_models`.
KINDS = {
    "t2v": "t2v",
    "i2v": "i2v",
    "flf2v": "flf2v",
    "ti2v": "ti2v-5b",
    "vace": "vace",
    "fun-control": "fun-control",
    "fun-camera": "camera",
}
SIZES = {"dim": 128, "ffn_dim": 320, "num_heads": 1, "num_layers": 2, "text_dim": 24}


@functools.cache
def model(kind: str):
    """A patcher of this kind, as wide as the adapters of `weights_kinds`; shared, and never changed by a test."""
    return host_models.patcher(KINDS[kind], **SIZES)


@functools.cache
def state(kind: str) -> dict[str, torch.Tensor]:
    """Original name -> tensor of `model(kind)`, a copy."""
    return {name: p.detach().clone() for name, p in model(kind).model.diffusion_model.named_parameters()}


class Folders:
    """`loras` and `diffusion_models` of a test's own."""

    def __init__(self, base: Path, monkeypatch) -> None:
        import folder_paths

        self.base = base
        for name in ("loras", "diffusion_models"):
            (base / name).mkdir()
            monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(base / name)], {".safetensors"}))

    def save(self, tensors, name="w.safetensors", metadata=None, folder="loras") -> str:
        """Write a file; gives what the node's list calls it."""
        save(self.base / folder / name, tensors, metadata)
        return self.entry(name, folder)

    def entry(self, name: str, folder="loras") -> str:
        """What the node's list calls a file that was written by other means."""
        import folder_paths

        folder_paths.filename_list_cache.clear()
        return f"{folder}/{name}"


@contextlib.contextmanager
def loaded(patcher):
    """Original name -> parameter, while ComfyUI has the model and its patches in place."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    try:
        yield dict(patcher.model.diffusion_model.named_parameters())
    finally:
        comfy.model_management.unload_all_models()


def weights(patcher) -> dict[str, torch.Tensor]:
    """Original name -> what the model computes with."""
    with loaded(patcher) as parameters:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def is_untouched(kind: str) -> bool:
    """Whether the shared model is bit for bit what it was, once ComfyUI has taken patches off."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    now = model(kind).model.diffusion_model.named_parameters()
    return all(torch.equal(parameter, state(kind)[name]) for name, parameter in now)
