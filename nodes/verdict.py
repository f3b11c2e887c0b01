"""What `validate_inputs` answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..t3.errors import T3Error


def verdict(check: Callable[..., Any], *values: Any) -> bool | str:
    """True, or what `check` has to say against these values, for the user to read."""
    try:
        check(*values)
    except T3Error as error:
        return str(error)
    return True
