"""`FILE:STRENGTH`, as options for adapters take it."""

from __future__ import annotations

import math
from pathlib import Path

from .errors import T3Error


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
