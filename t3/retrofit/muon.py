"""Muon for many small matrices: torch's own optimiser, matrices of one shape taken together.

`torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/) takes one matrix after the other, some twenty launches
each. For the hundred matrices of a small transformer the launches cost more than the rest of a step.
"""

from __future__ import annotations

from typing import Any

import torch


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with steps as long as AdamW's and its state; `step` differs by bfloat16's rounding alone."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        """parameters: matrices, each whole on its device."""
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. `closure`, where given, computes the loss again, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = (parameter.shape, parameter.device, parameter.dtype)
                    alike.setdefault(key, []).append(parameter)
            for parameters in alike.values():
                self._step_together(group, parameters)
        return loss

    def _step_together(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        """A step of matrices `[m, n]` that are alike."""
        gradients: Any = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        weights: Any = parameters
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        steps = torch._foreach_lerp(gradients, means, group["momentum"]) if group["nesterov"] else means
        together = orthogonalised(torch.stack(tuple(steps)), group["ns_coefficients"], group["ns_steps"], group["eps"])
        # As "match_rms_adamw" says.
        rate = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(together.to(parameters[0].dtype).unbind()), alpha=-rate)


def orthogonalised(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Each of `[K, m, n]` with singular values near one, in bfloat16, by `steps` of Newton and Schulz's iteration."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.bfloat16()
    found = found.mT if tall else found
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found
