"""Means of what training says of itself, added up on the device: reading a number would make the device wait."""

from __future__ import annotations

import time
from typing import Any

import torch

from .session import Session


class Log:
    """Losses, gradient norms and pace since they were last taken."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._start()

    def _start(self) -> None:
        device = self.session.accelerator.device
        self._sums, self._norms = torch.zeros(4, device=device), torch.zeros((), device=device)
        self._rounds, self._rate, self._since = 0, 0.0, time.monotonic()
        self.steps = 0

    def losses(self, total: torch.Tensor, parts: torch.Tensor) -> None:
        """One round's weighted loss and `[flow, velocity, attention]`."""
        self._sums += torch.cat([total.detach().float()[None], parts.float()])
        self._rounds += 1

    def norm(self, norm: Any) -> None:
        """One step's gradient norm, before it was clipped."""
        self._norms += norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, rate: float) -> None:
        """A step was taken at this learning rate."""
        self.steps, self._rate = self.steps + 1, rate

    def take(self) -> tuple[dict[str, float], float]:
        """The means over all processes, as columns of `metrics.csv`, and seconds a step; then start anew."""
        sums = self.session.accelerator.reduce(self._sums, "mean") / max(1, self._rounds)
        values = dict(zip(("loss", "flow", "velocity", "attention"), sums.tolist(), strict=True))
        steps = max(1, self.steps)
        found = {**values, "lr": self._rate, "grad_norm": self._norms.item() / steps}
        pace = (time.monotonic() - self._since) / steps
        self._start()
        return found, pace
