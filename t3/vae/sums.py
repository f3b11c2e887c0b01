"""Sums whose terms are still apart: what a convolution gives, its bias, and what goes by it.

Whoever takes such a sum next adds it up in one pass over memory, together with the norm that it begins with, straight
to where the next convolution wants it.
"""

from __future__ import annotations

import torch

from ..kernels.conv_sum import naive
from ..kernels.conv_sum.naive import Doubled
from ..kernels.usable import triton_usable
from .tiles import Window


class Sum:
    """`y + bias + by`: one frame, `[B, C, h, w]`, holding `window`.

    Adding it up uses the terms up. `Sum(x, window)` is a tensor that is a value already, and stays as it is.
    """

    def __init__(
        self,
        y: torch.Tensor,
        window: Window,
        bias: torch.Tensor | None = None,
        by: torch.Tensor | None = None,
        doubled: Doubled | None = None,
    ) -> None:
        """Terms as for `t3.kernels.conv_sum.naive.conv_sum`; y and by begin where `window` does."""
        self.window, self.dtype, self.device = window, y.dtype, y.device
        self.shape = (y.shape[0], y.shape[1] // (4 if doubled else 1), window.rows.length, window.cols.length)
        plain = bias is None and by is None and doubled is None
        self._value = y[..., : self.shape[2], : self.shape[3]] if plain else None
        self._terms = None if plain else (y, bias, by, doubled)

    def plus(self, by: torch.Tensor) -> Sum:
        """This sum with one more term, which begins where `window` does."""
        y, bias, _, _ = self._taken()
        return Sum(y, self.window, bias, by)

    def plus_dealt(self, by: torch.Tensor, times: int, frame: int) -> Sum:
        """This doubled picture with one more term, at half the size; see `Doubled` for times and frame."""
        y, bias, _, doubled = self._taken()
        return Sum(y, self.window, bias, by, doubled._replace(times=times, frame=frame))

    def room(self) -> torch.Tensor:
        """A tensor to write the sum or its norm to, laid out as convolutions want it."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=layout(self.device))

    def value(self) -> torch.Tensor:
        """The sum. A view of a larger tensor where nothing was to be added."""
        if self._value is None:
            self._value = self.room()
            self._add_up(total=self._value)
        return self._value

    def forget(self) -> None:
        """Hold on to no tensor: nobody wants the sum any more."""
        self._value = self._terms = None

    def write(self, place: torch.Tensor) -> None:
        """Put the sum into a tensor of its shape."""
        if self._value is None:
            self._add_up(total=place)
        else:
            place.copy_(self._value)

    def write_normed(self, place: torch.Tensor, gamma: torch.Tensor, silu: bool, keep: bool) -> None:
        """Put its RMS norm, with SiLU if asked for, into a tensor of its shape. keep: whether `value` is wanted too."""
        if self._value is None:
            self._value = self.room() if keep else None
            self._add_up(total=self._value, normed=place, gamma=gamma, silu=silu)
        else:
            _conv_sum(self._value, normed=place, gamma=gamma, silu=silu)

    def _add_up(self, **results) -> None:
        _conv_sum(*self._taken(), **results)

    def _taken(self) -> tuple:
        assert self._terms is not None, "these terms are used up"
        terms, self._terms = self._terms, None
        return terms


def _conv_sum(y: torch.Tensor, *terms, **results) -> None:
    if triton_usable(y.device, y.dtype):
        from ..kernels.conv_sum.kernel import conv_sum

        conv_sum(y, *terms, **results)
    else:
        naive.conv_sum(y, *terms, **results)


def layout(device: torch.device) -> torch.memory_format:
    """Of pictures and weights: channels last, which is fastest on CPUs and CUDA; on Apple's GPUs that is not known."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def laid_out(x: torch.Tensor) -> torch.Tensor:
    """The same picture, laid out as convolutions on its device want it (a part of such a picture is)."""
    last = layout(x.device) == torch.channels_last
    return x.contiguous(memory_format=torch.channels_last) if last and x.stride(1) != 1 else x
