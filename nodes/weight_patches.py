"""Weights of a file as patches on a clone of a ComfyUI model, with the arithmetic of `t3.weights`.

The host has patches of its own for most forms, but its DoRA is another one and its "set" knows no strength. So each
change is a patch object of ours, which the host keeps, orders, moves to the card and takes off like its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase

from ..t3.errors import T3Error
from ..t3.weights import Identity, WeightFile
from ..t3.weights.adapter_file import Piece, scale_of
from ..t3.weights.arithmetic import changed
from ..t3.weights.catalogue import transformer_name
from ..t3.weights.fingerprint import Fingerprint, fingerprint
from ..t3.weights.layout_dit import dit_config
from ..t3.weights.scales import companion_of
from . import wan


@dataclass(frozen=True)
class Scaled:
    """A tensor with a scale of its own: read when it is needed, since in float32 it takes four times the room."""

    file: WeightFile
    key: str


class T3WeightPatch(WeightAdapterBase):
    """One change to one parameter, in a form that the host takes for a weight adapter.

    `weights` is `(kind, scale, ((role, tensor), ...))`; `kind` and roles as in `t3.weights.arithmetic`. The host makes
    copies of it whose tensors lie on the card, by `type(patch)(loaded_keys, weights)`.
    """

    name = "t3"

    def __init__(self, loaded_keys: set[str], weights: Any) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """The host's call. `intermediate_dtype` is what it goes on computing in; the sum itself is float32 or wider."""
        kind, scale, parts = self.weights
        wide = torch.promote_types(weight.dtype, torch.float32)
        tensors = {role: _on(tensor, weight.device, wide) for role, tensor in parts}
        result = changed(kind, tensors, weight.to(wide), scale=scale, strength=strength)
        # A copy, where it is the file's own tensor: the host adds further patches in place.
        return result.to(intermediate_dtype, copy=kind == "set")


def _on(tensor: torch.Tensor | Scaled, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(tensor, Scaled):
        tensor = tensor.file.read(tensor.key)
    return comfy.model_management.cast_to_device(tensor, device, dtype)


@dataclass(frozen=True)
class Target:
    """The parameters of a model's diffusion model, by their canonical names."""

    parameters: dict[str, torch.nn.Parameter]

    @classmethod
    def of(cls, model) -> Target:
        """Those of a `ModelPatcher`. Raises `T3Error` where it is no Wan model."""
        diffusion_model = model.model.diffusion_model
        wan.require(diffusion_model)
        return cls(dict(diffusion_model.named_parameters()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def fingerprint(self, model) -> Fingerprint | None:
        """The fingerprint of the weights as they were loaded, whatever patches are on them."""
        try:
            name = transformer_name(dit_config(self.shapes))
        except (KeyError, IndexError, ValueError, TypeError):  # a relative of Wan's, of sizes not known here
            name = type(model.model.diffusion_model).__name__
        return fingerprint(name, self.parameters, lambda parameter: _loaded(model, parameter))


def _loaded(model, name: str) -> torch.Tensor:
    key = wan.PREFIX + name
    # While a clone's patches are in place, what was there before them.
    if key in model.object_patches_backup:
        return model.object_patches_backup[key]
    return model.backup[key].weight if key in model.backup else comfy.utils.get_attr(model.model, key)


def pieces(file: WeightFile, found: Identity) -> list[Piece]:
    """All changes a file makes: those of an adapter, or a whole model's tensors in place of what is there."""
    if found.adapter:
        return found.adapter.pieces
    return [Piece(name, "set", {"set": key}) for name, key in found.names.items()]


def check_finite(file: WeightFile, found: Identity) -> None:
    """Raise `T3Error` where an adapter holds NaN or infinite numbers. Whole models are too large to read twice."""
    for key in found.adapter.matched if found.adapter else ():
        if not torch.isfinite(file.read(key).float()).all():
            raise T3Error(f"{file.path}: {key!r} holds numbers that are not finite. The file is damaged.")


def put(model, file: WeightFile, changes: Iterable[Piece], strength: float) -> None:
    """Patch `model`, a clone the caller made, with changes that `check_fit` let pass."""
    diffusion_model = model.model.diffusion_model
    rounds: list[dict[str, T3WeightPatch]] = []
    for piece in changes:
        patch = _patch(file, piece)
        key = wan.PREFIX + piece.target
        if not _patched_by_host(diffusion_model, piece.target):
            _put_table(model, key, patch, strength)
            continue
        # One call for many parameters, since each lists the whole model; a second change to one goes into the next.
        free = next((taken for taken in rounds if key not in taken), None)
        if free is None:
            rounds.append(free := {})
        free[key] = patch
    for patches in rounds:
        placed = model.add_patches(patches, strength)
        if len(placed) != len(patches):
            lost = sorted(patches.keys() - set(placed))
            raise T3Error(f"ComfyUI has no place for {len(lost)} changes, first {lost[0]!r}; nothing was applied.")


def _patch(file: WeightFile, piece: Piece) -> T3WeightPatch:
    parts = tuple((role, _part(file, key)) for role, key in piece.keys.items())
    return T3WeightPatch(set(piece.keys.values()), (piece.kind, scale_of(file, piece), parts))


def _part(file: WeightFile, key: str) -> torch.Tensor | Scaled:
    """Mapped from the file: no memory until it is used."""
    return file.read_raw(key) if companion_of(key, file) is None else Scaled(file, key)


def _patched_by_host(diffusion_model: torch.nn.Module, name: str) -> bool:
    """Whether ComfyUI applies patches to a parameter: only where its module has no modules with parameters inside.

    The others are modulation tables and position embeddings.
    """
    owner = diffusion_model.get_submodule(name.rpartition(".")[0])
    return not any("." in inner for inner, _ in owner.named_parameters())


def _put_table(model, key: str, patch: T3WeightPatch, strength: float) -> None:
    """Set a small parameter that the host leaves alone to its new value, as an object patch."""
    old = model.get_model_object(key)
    with torch.no_grad():
        new = patch.calculate_weight(old.detach(), key, strength, 1.0, None, None).to(old.dtype)
    model.add_object_patch(key, torch.nn.Parameter(new.to(model.offload_device), requires_grad=False))
