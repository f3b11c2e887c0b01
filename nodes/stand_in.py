"""What stands in for a forward of the host's, ours or another pack's, and the host's Cancel button."""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_management
import torch

# A block of so many tokens takes long enough that a wait in between costs nothing.
WAIT_FROM_TOKENS = 32_768


class StandIn:
    """Stands in for the `forward` of one module of one model. installation: a `patch.Installation`.

    The module is held weakly. The host puts this into the module, which a strong reference would make a cycle: the host
    drops a model by its reference count, and its weights would stay until Python happens to look for cycles.
    """

    def __init__(self, module: torch.nn.Module, layer: int, installation: Any) -> None:
        self._module = weakref.ref(module)
        self.layer = layer
        self.installation = installation

    @property
    def module(self) -> Any:
        """The module, which lives as long as a model that can call this."""
        return self._module()


def is_ours(patch: Any) -> bool:
    """Whether an object patch, or what stands in place of a method, is one of ours."""
    return isinstance(getattr(patch, "__self__", None), StandIn)


def owner(patch: Any) -> str:
    """The Python module a patch comes from, which names its pack."""
    return getattr(patch, "__module__", None) or type(patch).__module__


def foreign_forward(module: torch.nn.Module) -> Any:
    """What another node has put in place of this module's forward, or None."""
    forward = vars(module).get("forward")
    if forward is None or is_ours(forward):
        return None
    # The module's own method is what the host leaves behind when it takes a patch off.
    bound = getattr(forward, "__self__", None)
    own = isinstance(bound, torch.nn.Module) and forward.__func__ is type(bound).forward
    return None if own else forward


def changed_by(module: torch.nn.Module) -> str | None:
    """Who changed or watches what this module computes, in words, or None: then a call is its class's forward."""
    forward = foreign_forward(module)
    if forward is not None:
        return owner(forward)
    return "a hook" if module._forward_hooks or module._forward_pre_hooks else None


def stop_if_cancelled(x: torch.Tensor) -> None:
    """Raise the host's exception if the user pressed Cancel; called once a block, on the block's tokens `[B, N, dim]`.

    At video sizes it waits for the card first: Python runs whole forward passes ahead of a GPU, and would look for
    Cancel long before the user had time to press it. The wait leaves the card idle for microseconds a block.
    """
    if x.is_cuda and x.shape[1] >= WAIT_FROM_TOKENS:
        torch.cuda.current_stream(x.device).synchronize()
    comfy.model_management.throw_exception_if_processing_interrupted()
