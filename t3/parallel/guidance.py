"""The two predictions of a guided step on two ranks: one with the prompt, one without, exchanged before they are mixed.

The numbers are those of one rank: each prediction is computed as there, and every rank mixes the same two.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# The names under which diffusers' Wan pipelines ask for a prediction, with `cache_context`, in this order.
COND, UNCOND = NAMES = ("cond", "uncond")


class GuidanceSplit:
    """Stands in for the `forward` of a transformer on one of the two ranks.

    The pipeline asks for both predictions, one after the other. The rank of the first computes it and, when asked for
    the second, exchanges. The other's first answer is a tensor that is filled when it has computed the second.
    """

    def __init__(self, transformer: Any, group: Any, prediction: int) -> None:
        """group: of the two ranks; prediction: this rank's, 0 or 1 of `NAMES`."""
        self.transformer, self.group, self.prediction = transformer, group, prediction
        self.channels = transformer.config.out_channels
        self._forward, self._context = transformer.forward, transformer.cache_context
        self._asked: str | None = None
        self._first: torch.Tensor | None = None
        transformer.forward, transformer.cache_context = self.forward, self.cache_context

    def remove(self) -> None:
        """Give the transformer its own forward back: it computes both predictions again."""
        self.transformer.forward, self.transformer.cache_context = self._forward, self._context

    @contextmanager
    def cache_context(self, name: str, *args, **kwargs):
        """As the transformer's own; remembers which prediction is asked for."""
        self._asked = name
        try:
            with self._context(name, *args, **kwargs):
                yield
        finally:
            self._asked = None

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor]:
        """The prediction asked for, in float32 or wider, as `return_dict=False` gives it.

        The answer to the first question is complete once the second was asked.
        """
        if self._asked not in NAMES or kwargs.get("return_dict", True):
            raise RuntimeError(f"a prediction {self._asked!r} was asked for in a way the guidance split does not know")
        own = NAMES.index(self._asked) == self.prediction
        answer = self._compute(*args, **kwargs) if own else self._empty(kwargs["hidden_states"])
        if self._asked == COND:
            self._first = answer
            return (answer,)
        assert self._first is not None, "the prediction without the prompt was asked for first"
        both = [self._first, answer]
        mine = both[self.prediction]
        other = torch.empty_like(mine)
        dist.all_gather([mine, other] if self.prediction == 0 else [other, mine], mine.clone(), group=self.group)
        both[1 - self.prediction].copy_(other)
        self._first = None
        return (answer,)

    def _compute(self, *args, **kwargs) -> torch.Tensor:
        return _wide(self._forward(*args, **kwargs)[0]).contiguous()

    def _empty(self, latents: torch.Tensor) -> torch.Tensor:
        dtype = latents.dtype if latents.dtype.itemsize >= 4 else torch.float32
        return latents.new_empty((latents.shape[0], self.channels, *latents.shape[2:]), dtype=dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least: what a hook behind this one turns into float32 is then the tensor that is filled."""
    return x.float() if x.dtype.itemsize < 4 else x
