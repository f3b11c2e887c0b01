"""Names for operators of torch's."""

from __future__ import annotations

import re


def own_namespace(module: str) -> str:
    """A namespace for the operators of the module with this `__name__`: the pack and an installed t3 may both be
    loaded, and each has its own. In ASCII, whatever the pack's folder is called: torch takes nothing else."""
    return re.sub(r"\W", "_", module, flags=re.ASCII)
