"""The optimisers of a run: one for all that is trained, or one for matrices and one for the rest."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import T3Error
from .config import Train
from .trainable import trained


def make_optimizers(module: torch.nn.Module, train: Train) -> list[torch.optim.Optimizer]:
    """Optimisers for what is trained; weight decay on matrices only.

    "muon" takes the matrices of the blocks, whose steps it makes as large as AdamW's, and AdamW the rest. Raises
    `T3Error` where what is asked for is not installed.
    """
    named = trained(module)
    by_muon = {name for name, p in named.items() if train.optimizer == "muon" and of_muon(name, p)}
    decayed = {name for name, p in named.items() if p.ndim >= 2 and not name.endswith("scale_shift_table")}
    groups = [
        {"params": [named[name] for name in named if name in some], "weight_decay": decay}
        for some, decay in ((decayed - by_muon, train.weight_decay), (named.keys() - decayed, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": 0.0, "betas": (train.beta1, train.beta2), "eps": 1e-8}
    if train.optimizer == "adamw-8bit":
        return [_adamw_8bit(groups, settings)]
    found: list[torch.optim.Optimizer] = []
    if groups:
        found.append(torch.optim.AdamW(groups, fused=torch.cuda.is_available() and train.device != "cpu", **settings))
    if by_muon:
        found.append(_muon([named[name] for name in named if name in by_muon], train.weight_decay))
    return found


def of_muon(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon, where asked for, trains it: a matrix of a block, or its LoRA's."""
    return parameter.ndim == 2 and "blocks." in name


def _muon(parameters: list[torch.nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise T3Error(
            f'[train] optimizer is "muon", which comes with torch 2.9; this is {torch.__version__}. Upgrade torch, or '
            'use "adamw".'
        )
    from .muon import StackedMuon

    return StackedMuon(parameters, lr=0.0, weight_decay=weight_decay)


def _adamw_8bit(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise T3Error(
            '[train] optimizer is "adamw-8bit", and the package bitsandbytes is not installed: pip install '
            'bitsandbytes, or use "adamw" (6 bytes more for each trained parameter).'
        ) from None
    return AdamW8bit(groups, **settings)
