"""A decoder or encoder made of a VAE's state dict, whichever names its tensors have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import T3Error
from ..weights.layout_vae import vae_config_from_diffusers, vae_layout


def build(
    cls: Any,
    part: str,
    read: Callable[[Mapping[str, tuple[int, ...]]], Any],
    sd: Mapping[str, torch.Tensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Any:
    """`cls(state, structure)`, a module that is `part` ("decoder" or "encoder") of a VAE, with the weights `sd`.

    read: gives the structure from shapes by original names. Raises as `from_state_dict` of the modules says.
    """
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
        raise T3Error(f"dtype is {dtype}; the {part} works in bfloat16, float16, float32 or float64.")
    names = _original_names(sd)
    structure = read({name: tuple(sd[key].shape) for name, key in names.items()})
    try:
        module = cls(_Reader({name: sd[key] for name, key in names.items()}, device, dtype), structure).eval()
    except KeyError as error:
        raise T3Error(
            f"these weights are no whole {structure.generation} VAE: {error.args[0]} is missing. Download or "
            "export it again."
        ) from None
    return module.to(module.device)  # what the layers made for themselves is there too then


class _Reader(dict):
    """Tensors on the device and in the dtype asked for, each converted when it is read."""

    def __init__(self, state: Mapping[str, torch.Tensor], device, dtype) -> None:
        super().__init__(state)
        self._device, self._dtype = device, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).detach().to(self._device, self._dtype)


def _original_names(sd: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Original name -> key of `sd`, from either naming."""
    if "decoder.conv_in.weight" not in sd:
        return {key: key for key in sd}
    shapes = {key: tuple(tensor.shape) for key, tensor in sd.items()}
    try:
        layout = vae_layout(vae_config_from_diffusers(shapes))
    except (KeyError, IndexError, ValueError) as error:
        raise T3Error(
            f"these weights have diffusers' names but are no whole Wan VAE ({error}). Use the state dict of a whole "
            "AutoencoderKLWan, or the original file."
        ) from None
    return {original: param.name for original, param in layout.items() if param.name in sd}
