"""What computes dense attention inside a window: a registry of backends that state what they can do.

`choose` picks one for given tensors and says why; `explain` says it for every backend. `python -m t3.backends` prints
that table for this machine. A chosen backend that fails later is an error: nothing here falls back in silence.
"""

from .choice import AUTO, AUTO_INT8, auto_order, choose, explain
from .registry import BACKENDS, HALF, Backend, Situation, installed

__all__ = [
    "AUTO",
    "AUTO_INT8",
    "BACKENDS",
    "HALF",
    "Backend",
    "Situation",
    "auto_order",
    "choose",
    "explain",
    "installed",
]
