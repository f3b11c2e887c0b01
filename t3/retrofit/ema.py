"""An exponential moving average of what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class Average:
    """Float32 averages of parameters. The decay rises from nothing, so that short runs are not held at the start."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [tensor.clone() for tensor in self._own()]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the parameters in after the step number `steps`, counted from 1."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self.values, self._own(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are their averages inside of the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters."""
        own = self._own()
        now = [tensor.clone() for tensor in own]
        torch._foreach_copy_(own, self.values)
        torch._foreach_copy_(self.values, now)

    def _own(self) -> list[torch.Tensor]:
        """The parameters' own numbers; under FSDP those that this process holds."""
        return [(p.to_local() if hasattr(p, "to_local") else p).detach() for p in self.parameters]
