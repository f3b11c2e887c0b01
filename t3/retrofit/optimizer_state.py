"""What an optimiser keeps of each parameter, as tensors by name, which is all that a safetensors file holds.

torch's AdamW keeps tensors. bitsandbytes keeps the number of steps as an int, its tensors in a dictionary of their own,
and one table of its 8-bit numbers for all parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SEPARATOR = "|"
_NUMBERS = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}


def flatten(states: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """States by parameter as tensors. The name is the way to each, `weight|exp_avg`; a number's kind is added to it.

    No two of the tensors share memory. Raises `TypeError` for a value that is neither tensor, number nor a mapping.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            shared = value.numel() and value.data_ptr() in seen
            found[name] = value.clone() if shared else value
            seen.add(value.data_ptr())
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}{SEPARATOR}{key}", inner)
        elif (kind := type(value).__name__) in _NUMBERS:
            found[f"{name}{SEPARATOR}{kind}"] = torch.tensor(value, dtype=_NUMBERS[kind])
        else:
            raise TypeError(f"the optimiser keeps {type(value).__name__} as {name}")

    for name, state in states.items():
        add(name, state)
    return found


def restore(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """The states that `flatten` was given."""
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        *way, last = name.split(SEPARATOR)
        value: Any = tensor
        if last in _NUMBERS and len(way) > 1:
            value = tensor.item()
            *way, last = way
        place: dict[str, Any] = states
        for key in way:
            place = place.setdefault(key, {})
        place[last] = value
    return states
