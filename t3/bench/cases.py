"""What is measured: grids of tokens under a plan, with the heads of a model; and random inputs of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..backends import Situation
from ..cost import attention_pairs
from ..errors import T3Error
from ..plan import EACH, Grid, Layer, Partition, Plan

EPS = 1e-6
WAN21, WAN22 = Plan.preset("wan2.1-4k"), Plan.preset("wan2.2-4k")
# A plan of the same kind for grids of a few dozen tokens.
SMALL = Plan(
    "small",
    Grid(2, 6, 10),
    (Layer(EACH, 1, 1), Layer(1, 2, 5), Layer(1, 3, 2), Layer(2, 2, 2), Layer(1, 2, 2)),
)


@dataclass(frozen=True)
class Case:
    """A grid under a plan, and the heads of the model's self-attention."""

    name: str
    plan: Plan
    grid: Grid
    heads: int
    head_dim: int = 128

    @property
    def label(self) -> str:
        """The name with the sizes that the figures depend on."""
        return f"{self.name}: {'x'.join(map(str, self.grid))} tokens, {self.heads}x{self.head_dim}"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        """Layers of the plan's cycle."""
        return len(self.plan.layers)

    @property
    def partitions(self) -> list[Partition]:
        return self.plan.partitions(self.grid, self.layers)

    def layer_macs(self, layer: int) -> int:
        """Multiply-accumulates of a layer's attention, coinciding groupings once."""
        return 2 * attention_pairs(self.grid, self.partitions[layer]) * self.width

    @property
    def divides(self) -> bool:
        """Whether every window count divides its axis, as the released code needs."""
        return all(not n % c for p in self.partitions for n, c in zip(self.grid, p, strict=True))


CASES = (
    Case("1.3B 4K", WAN21, Grid(21, 136, 240), 12),
    Case("5B 4K", WAN22, Grid(21, 68, 120), 24),
    Case("1.3B 720p", WAN21, Grid(21, 45, 80), 12),
    Case("1.3B 1080p", WAN21, Grid(21, 68, 120), 12),
    Case("1.3B 1440p", WAN21, Grid(21, 90, 160), 12),
    Case("1.3B odd", WAN21, Grid(21, 67, 121), 12),
)
TINY = (Case("tiny", SMALL, Grid(2, 6, 10), 2, 64), Case("tiny odd", SMALL, Grid(3, 5, 7), 2, 64))


def pick_cases(names: list[str] | None, tiny: bool, every: tuple[Case, ...] = CASES) -> list[Case]:
    """The cases of these names, or all. Raises `T3Error` for a name that is none of them."""
    every = TINY if tiny else every
    known = {case.name: case for case in every}
    for name in names or ():
        if name not in known:
            raise T3Error(f"--cases {name!r} is not known; known are {', '.join(map(repr, known))}.")
    return [known[name] for name in names] if names else list(every)


class LayerInputs:
    """Random inputs of one layer's self-attention, batch 1.

    qkv: projected q, k, v `[1, N, width]`; norms: weights `[width]` of the RMS norms of q and k; turns: cosine and sine
    `[1, N, head_dim/2]` float32, views into rotations laid out as ComfyUI has them, `[1, N, 1, head_dim/2, 2, 2]`.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype | None = None, seed: int = 1) -> None:
        """dtype: bfloat16 on a card and float32 on a CPU if None."""
        self.case, self.device = case, device
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        n = case.grid.tokens
        self.qkv = [random(1, n, case.width).to(self.dtype) for _ in range(3)]
        self.norms = ((1 + random(case.width) / 4).to(self.dtype), (1 + random(case.width) / 4).to(self.dtype))
        angle = random(1, n, 1, case.head_dim // 2) * 3
        self.freqs = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))

    @property
    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.freqs[:, :, 0, :, 0, 0], self.freqs[:, :, 0, :, 1, 0]

    @property
    def around(self) -> dict[str, Any]:
        """What stands around attention, as `fused.attention_from_projections` takes it."""
        return {"heads": self.case.heads, "norms": self.norms, "eps": EPS, "turns": self.turns}

    @property
    def heads(self) -> list[torch.Tensor]:
        """q, k, v as `[1, N, heads, head_dim]`."""
        return [x.unflatten(-1, (self.case.heads, -1)) for x in self.qkv]

    @property
    def situation(self) -> Situation:
        return Situation(self.device, self.dtype, self.case.head_dim)

    def over(self, partitions: Sequence[Partition]) -> Situation:
        """The situation with the windows of these layers, by which `auto` goes where it knows them."""
        windows = tuple(n for partition in partitions for n in partition.window_lengths(self.case.grid))
        return replace(self.situation, windows=windows)

    def some_tokens(self, count: int = 8, seed: int = 3) -> list[int]:
        """Tokens to compare with float64: the first, the last, and others at random."""
        n = self.case.grid.tokens
        generator = torch.Generator().manual_seed(seed)
        return [0, n - 1, *torch.randint(0, n, (count - 2,), generator=generator).tolist()]
