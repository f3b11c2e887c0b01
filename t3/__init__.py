"""T3 attention for trained video diffusion transformers, and the headless engine around it.

Importing this package imports neither torch nor anything else heavy; `t3_attention` loads torch on first use.
"""

from .plan import Grid, Partition, Plan

__version__ = "0.1.0"
__all__ = ["Grid", "Partition", "Plan", "t3_attention"]


def __getattr__(name: str):
    if name == "t3_attention":
        from .attention import t3_attention

        return t3_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
