"""Checkpoints: a folder per step, complete or not there, from which a run goes on bit for bit.

checkpoints/step-00000500/
    weights.safetensors     what is trained, float32
    average.safetensors     its moving average, if there is one
    optimizer.safetensors   the optimisers' states, named as `optimizer_state` says
    state.json              where the run is, and the config it belongs to
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..errors import T3Error
from ..files import atomic_folder, reason
from . import optimizer_state
from .ema import Average

FOLDER = "checkpoints"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SPREAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


class NotSaved(Exception):
    """A checkpoint could not be written; the message says why. Former checkpoints are as they were."""


Tensors = dict[str, torch.Tensor]


def weights(model: torch.nn.Module, frozen: bool = False) -> Tensors:
    """What is trained, and what is not where `frozen`, whole, on the CPU, copied. Every process must call it."""
    found: dict[str, Any] = get_model_state_dict(model, options=replace(_FULL, ignore_frozen_params=not frozen))
    return {name: value.clone() for name, value in found.items()}


def collect(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None
) -> dict[str, Tensors]:
    """What training has changed, whole, on the CPU, by file name. Every process must call it."""
    parts = {"weights": weights(model)}
    if average is not None:
        with average.applied():
            parts["average"] = weights(model)
    # The first process alone gets it.
    states: Any = get_optimizer_state_dict(model, optimizers, options=_FULL).get("state", {})
    parts["optimizer"] = optimizer_state.flatten(states)
    return parts


def save(run: Path, step: int, parts: dict[str, Tensors], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`. Raises `NotSaved`; nothing is lost then."""
    final = run / FOLDER / f"step-{step:08}"
    need = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < need:
            raise OSError(f"it takes {need / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free")
        with atomic_folder(final, overwrite=True) as folder:
            for name, tensors in parts.items():
                save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
            (folder / STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
    except (OSError, SafetensorError, T3Error) as error:
        raise NotSaved(reason(error)) from error
    for old in listed(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def listed(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if _NAME.fullmatch(path.name))


def read_state(folder: Path) -> dict[str, Any]:
    """Where the run of a checkpoint is. Raises `T3Error` for a damaged one."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(folder, error) from None


def load(
    folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None
) -> None:
    """Put a checkpoint's tensors in place, on every process. Raises `T3Error` for a damaged one."""
    try:
        parts = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except (OSError, SafetensorError) as error:
        raise damaged(folder, error) from None
    states: dict[str, Any] = optimizer_state.restore(parts["optimizer"])
    if average is not None:
        _put(model, parts["average"])
        average.swap()
    _put(model, parts["weights"])
    groups = get_optimizer_state_dict(model, optimizers, options=_SPREAD)["param_groups"]
    set_optimizer_state_dict(model, optimizers, {"state": states, "param_groups": groups}, options=_SPREAD)
    # To have a place for every state torch takes a step of nothing. What had no gradient yet has none to count. Only
    # names that are surely the checkpoint's: wrappers put words of their own into a parameter's.
    stateless = parts["weights"].keys() - states.keys()
    for name, parameter in model.named_parameters():
        if name.removeprefix("module.") in stateless:
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


def _put(model: torch.nn.Module, tensors: Tensors) -> None:
    set_model_state_dict(model, dict(tensors), options=_SPREAD)


def damaged(folder: Path, error: object) -> T3Error:
    return T3Error(f"the checkpoint {folder} is damaged ({error}). Remove it; --resume then takes the one before.")
