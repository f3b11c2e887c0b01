"""The same weights before training, with dense attention: what the trained model is to agree with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from diffusers import WanTransformer3DModel

from .operator import Operator, install
from .trainable import Untouched


class Teacher:
    """Gives the untouched, dense model inside of `with teacher.on() as transformer:`.

    A LoRA's teacher is the trained model itself with its adapters off; otherwise it is a frozen copy in `dtype`.
    """

    def __init__(
        self, transformer: WanTransformer3DModel, operator: Operator, *, shared: bool, dtype: torch.dtype
    ) -> None:
        self.operator = operator
        self.untouched: Untouched | None = None
        if shared:
            self.untouched = Untouched(transformer)
            return
        self.operator = Operator(operator.plan, backend=operator.backend, dense=True)
        self.copy = copy.deepcopy(transformer).requires_grad_(False)
        self.copy.gradient_checkpointing = False
        kept = transformer._keep_in_fp32_modules or []
        for name, parameter in self.copy.named_parameters():
            if not any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.to(dtype)
        _forget_hooks(self.copy)
        install(self.copy, self.operator)

    def to(self, device: torch.device) -> None:
        """Move what is the teacher's own to where it will run."""
        if self.untouched is None:
            self.copy.to(device)
        else:
            self.untouched.to(device)

    @contextlib.contextmanager
    def on(self) -> Iterator[WanTransformer3DModel]:
        """The teacher, without gradients. The trained model's operator is as before when the block ends."""
        with torch.no_grad():
            if self.untouched is None:
                yield self.copy
                return
            was = self.operator.dense
            self.operator.dense = True
            try:
                with self.untouched.restored() as transformer:
                    yield transformer
            finally:
                self.operator.dense = was


def _forget_hooks(transformer: WanTransformer3DModel) -> None:
    """Drop the copied hook that would place the trained model's windows."""
    transformer._forward_pre_hooks.clear()
    transformer._forward_pre_hooks_with_kwargs.clear()
