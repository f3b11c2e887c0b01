"""PEFT keeps a LoRA's alpha outside of its tensors: in `adapter_config.json`, or in metadata that diffusers writes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import T3Error

if TYPE_CHECKING:
    from .files import WeightFile

SETTINGS_FILE = "adapter_config.json"
SETTINGS_KEY = "lora_adapter_metadata"  # in a safetensors header, by diffusers
ALL_SETTINGS_BESIDE = f"the settings ({SETTINGS_FILE} or `{SETTINGS_KEY}`)"
# Where a module's name ends and the name of its tensor begins.
_TENSOR = re.compile(r"\.(?:lora_|lokr_|hada_)")


@dataclass
class Settings:
    """What PEFT's settings say; `values` is empty when there are none. `source`: what messages call them."""

    values: dict[str, Any] = field(default_factory=dict)
    source: str = SETTINGS_FILE

    @property
    def dora(self) -> bool:
        return bool(self.values.get("use_dora"))

    def scale(self, key: str, rank: int) -> float:
        """What the settings multiply the adapter of `key` by; 1 where they say nothing.

        Raises T3Error when what they say is no finite number.
        """
        alpha = self.values.get("lora_alpha", self.values.get("alpha"))
        if alpha is None:
            return 1.0
        rank = rank or self.values.get("r") or 1
        stem = _TENSOR.split(key)[0]
        try:
            for pattern, value in (self.values.get("alpha_pattern") or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", stem):
                    alpha = value
                    break
            scale = float(alpha) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        except (TypeError, ValueError, AttributeError, ArithmeticError, re.error):
            scale = math.nan
        if not math.isfinite(scale):
            raise T3Error(
                f"{self.source} has alpha {alpha!r} for {stem!r} at rank {rank!r}; an alpha is a finite number, mostly "
                "the rank or a multiple of it. Correct it, or export the adapter again."
            )
        return scale


def read_settings(file: WeightFile, is_peft: bool) -> Settings:
    """The settings that belong to a file. `is_peft`: its keys are PEFT's, so a settings file beside it counts.

    Raises T3Error when settings are there and cannot be read.
    """
    packed = file.metadata.get(SETTINGS_KEY)
    source = f"{file.path}: its `{SETTINGS_KEY}`"
    if packed:
        try:
            found = json.loads(packed)
            return Settings({key.removeprefix("transformer."): value for key, value in found.items()}, source)
        except (ValueError, AttributeError) as error:
            raise T3Error(f"{source} cannot be read, so its scale is unknown.") from error
    if not is_peft:
        return Settings()
    try:
        return Settings(file.sibling(SETTINGS_FILE), str(file.folder / SETTINGS_FILE))
    except T3Error as error:
        raise T3Error(
            f"{file.path}: its scale is unknown, since it is in the settings beside it. {error} Download them again, "
            "or remove them if alpha equals the rank."
        ) from error
