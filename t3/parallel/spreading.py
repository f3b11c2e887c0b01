"""One video's tokens over several ranks, outside attention: each rank embeds, turns and projects its own alone.

In attention see `sequence`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..plan import Grid
from .sequence import Spread


class Spreading:
    """A transformer whose tokens are spread over the ranks of `spread`, from the latents to the last projection.

    To be made after T3 is installed, whose attention takes over in between. Every rank must be given the same inputs,
    and gets the whole output.
    """

    # Not diffusers' `enable_parallelism`: it needs an accelerator, its attention waits for each all-to-all, and every
    # rank embeds all tokens (1.3B at 4K: 25 ms of a forward in which 3.1 s are shared by two).
    def __init__(self, transformer: Any, spread: Spread) -> None:
        self.transformer, self.spread = transformer, spread
        # Of all tokens, and of those before what is embedded.
        self._tokens = self._before = 0
        self._turns, self._turns_before = transformer.rope.forward, vars(transformer.rope).get("forward")
        transformer.rope.forward = self._own_turns
        self._hooks = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.proj_out.register_forward_hook(self._gather),
        ]
        for name in ("patch_embedding", "vace_patch_embedding"):
            if (embedding := getattr(transformer, name, None)) is not None:
                self._hooks.append(embedding.register_forward_pre_hook(self._own_frames))
                self._hooks.append(embedding.register_forward_hook(self._own_tokens))

    def remove(self) -> None:
        """Each rank has all tokens again. T3's processors must be told apart, or removed."""
        if self._turns_before is None:
            del self.transformer.rope.forward
        else:
            self.transformer.rope.forward = self._turns_before
        for hook in self._hooks:
            hook.remove()

    @property
    def own(self) -> slice:
        """Which of all tokens are this rank's."""
        shares, rank = self.spread.shares(self._tokens), self.spread.rank
        return slice(sum(shares[:rank]), sum(shares[: rank + 1]))

    def _grid(self, latents: torch.Tensor) -> Grid:
        patch = self.transformer.config.patch_size
        return Grid(*(n // p for n, p in zip(latents.shape[2:], patch, strict=True)))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Count the tokens; where each has a time of its own, keep those of this rank's."""
        given = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        self._tokens = self._grid(given["hidden_states"]).tokens
        times = given["timestep"]
        if times.ndim == 2:
            times = times[:, self.own]
        if "timestep" in kwargs:
            return args, kwargs | {"timestep": times}
        return (args[0], times, *args[2:]), kwargs

    def _own_frames(self, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Of latents, or of what VACE is to follow, the frames that hold this rank's tokens."""
        (latents,) = args
        grid, step = self._grid(latents), self.transformer.config.patch_size[0]
        each = grid.h * grid.w
        # What VACE is to follow may end before the video, and is filled up by the model; a convolution needs a frame.
        first = min(self.own.start // each, grid.t - 1)
        last = max(first + 1, min(-(-self.own.stop // each), grid.t))
        self._before = first * each
        return (latents[:, :, first * step : last * step],)

    def _own_tokens(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Of these frames, `[B, dim, t, h, w]`, this rank's tokens, `[B, dim, n]`: the model flattens what it gets."""
        return output.flatten(2)[:, :, self.own.start - self._before : self.own.stop - self._before]

    def _own_turns(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """RoPE's cosines and sines of this rank's tokens, `[1, n, 1, head_dim]`, from its tables of each axis alone."""
        rope, (pt, ph, pw) = self.transformer.rope, self.transformer.config.patch_size
        grid, sizes = self._grid(latents), (rope.t_dim, rope.h_dim, rope.w_dim)
        token = torch.arange(self.own.start, self.own.stop, device=latents.device)
        places = token // (grid.h * grid.w), token // grid.w % grid.h, token % grid.w
        # Of its input only the shape is looked at.
        lines = latents[:, :, :, :ph, :pw], latents[:, :, :pt, :, :pw], latents[:, :, :pt, :ph]
        tables = [[x.split(sizes, dim=3) for x in self._turns(line)] for line in lines]
        return tuple(
            torch.cat([tables[axis][which][axis][:, at] for axis, at in enumerate(places)], dim=3) for which in (0, 1)
        )

    def _gather(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return gather(output, self.spread, self._tokens)


def gather(x: torch.Tensor, spread: Spread, tokens: int) -> torch.Tensor:
    """`[B, n, C]` of each rank to `[B, tokens, C]` on every rank."""
    shares = spread.shares(tokens)
    most, own = max(shares), shares[spread.rank]
    padded = x.contiguous() if own == most else torch.cat([x, x.new_zeros(x.shape[0], most - own, x.shape[2])], 1)
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=spread.group)
    return torch.cat([part[:, :share] for part, share in zip(parts, shares, strict=True)], dim=1)
