"""Files that go on top of a transformer: T3 weights and LoRAs, each at its strength. No torch import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import T3Error
from .weights import Identity, identify, open_weights
from .weights.catalogue import HEADLESS_KINDS, not_headless
from .weights.fit import check_fit
from .weights.layout_dit import dit_layout

EXPERTS = ("high", "low")  # by the noise each of two is for


@dataclass(frozen=True)
class Adapter:
    """A file to be applied on top of the transformer, and how strongly; expert: 0 or 1 where it is for one of two."""

    path: Path
    strength: float
    identity: Identity
    expert: int | None = None

    def describe(self) -> str:
        whom = "" if self.expert is None else f" for the {EXPERTS[self.expert]}-noise expert"
        return f"{self.path.name}{whom} at {self.strength:g}: {self.identity.describe()}"


def open_adapter(text: str, option: str, transformer: dict[str, Any], *, anywhere: bool = False) -> Adapter:
    """Open what an option names, `FILE` or `FILE:STRENGTH`, for a transformer of this config; headers alone are read.

    option: what messages name. anywhere: for kinds of models that do not run here, too.
    Raises `T3Error` for what is missing, of another kind, or does not fit.
    """
    path, strength = split_strength(text, option)
    file = open_weights(existing(str(path), option))
    identity = identify(file)
    if identity.component != "dit":
        problem = identity.problem or f"it is {identity.component}, {identity.form}"
        raise T3Error(f"{option} {path} cannot be applied to a Wan transformer: {problem}")
    if identity.problem:
        raise T3Error(f"{option} {path}: {identity.problem}")
    if not anywhere and identity.kind not in HEADLESS_KINDS:
        raise T3Error(f"{option} {path} is for a {identity.model} model. {not_headless(identity.kind)}")
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if identity.width is not None and identity.width != width:
        raise T3Error(
            f"{option} {path} is for a transformer {identity.width} wide ({identity.model}); "
            f"the one to be loaded is {width} wide. Use weights made for this model."
        )
    check_fit(file, identity, {name: param.shape for name, param in dit_layout(transformer).items()})
    return Adapter(path, strength, identity)


def split_strength(text: str, option: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`; a colon that belongs to the path (a Windows drive) is left alone.

    Raises `T3Error` where the strength is no finite number. `option`: what the message names.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not head or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(tail)
    except ValueError:
        if Path(head).exists():
            raise T3Error(f"{option} {text}: the strength {tail!r} is not a number.") from None
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise T3Error(f"{option} {text}: the strength {tail!r} is no finite number; 1 is the usual value.")
    return Path(head), strength


def existing(path: str, option: str) -> Path:
    """What an option names. Raises `T3Error` where nothing is there."""
    if not Path(path).exists():
        raise T3Error(f"{option} {path}: no such file or folder.")
    return Path(path)
