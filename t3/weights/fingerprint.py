"""Which base model weights were made for: a few dozen of its numbers, kept in a file's metadata.

Not a hash: the same model in bfloat16, float16 or fp8, or a fine-tune of it, must be recognised, and another model of
the same shape must not. Numbers are taken from modulation tables and query biases, which every Wan model has, which
stay in high precision in quantised files, and which differ between any two models trained apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import T3Error
from .layout_dit import block_index

if TYPE_CHECKING:
    import torch

BLOCKS, PLACES = 8, 4  # at most so many blocks, and numbers from each tensor
TENSORS = ("modulation", "self_attn.q.bias")
# Relative distance up to which two bases are taken for the same: rounding to 8 bits stays below, models trained apart
# are at 1 and more.
NEAR = 0.15


@dataclass(frozen=True)
class Fingerprint:
    """`model`: name of the base as `identify` gives it. `width`, `layers`: its size. `samples`: one row per tensor
    name of `TENSORS`."""

    model: str
    width: int
    layers: int
    samples: tuple[tuple[float, ...], ...]

    def distance(self, other: Fingerprint) -> float:
        """0 for the same weights, about 1 and more for weights trained apart, infinite for another size."""
        if (self.width, self.layers) != (other.width, other.layers):
            return math.inf
        return max(_distance(a, b) for a, b in zip(self.samples, other.samples, strict=True))

    def fits(self, other: Fingerprint) -> bool:
        """Whether both are the same base, give or take number formats and light tuning."""
        return self.distance(other) <= NEAR

    def describe(self) -> str:
        """For people: "wan2.1-t2v-1.3b, 1536 wide, 30 blocks"."""
        return f"{self.model}, {self.width} wide, {self.layers} blocks"

    def to_json(self) -> str:
        content = {"model": self.model, "width": self.width, "layers": self.layers, "samples": self.samples}
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Read what `to_json` writes. Raises `T3Error` when it is not that."""
        try:
            content = json.loads(text)
            sizes = content["width"], content["layers"]
            samples = tuple(tuple(float(x) for x in row) for row in content["samples"])
            whole = (
                isinstance(content["model"], str)
                and all(type(n) is int and n > 0 for n in sizes)
                and len(samples) == len(TENSORS)
                and {len(row) for row in samples} == {min(BLOCKS, sizes[1]) * PLACES}
                and all(math.isfinite(x) for row in samples for x in row)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise T3Error(f"the base model's fingerprint cannot be read ({error!r}).") from None
        if not whole:
            raise T3Error("the base model's fingerprint has values that are none.")
        return cls(content["model"], *sizes, samples)


def fingerprint(model: str, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> Fingerprint | None:
    """The fingerprint of a transformer; None when it lacks the tensors that make it up, or has them as packed bytes.

    Args:
        model: what the base is called (`Identity.model`).
        names: canonical parameter names.
        read: canonical name -> tensor, of any dtype and on any device. Called for at most 16 tensors.
    """
    present = set(names)
    layers = 1 + max((i for name in present if (i := block_index(name)) is not None), default=-1)
    count = min(BLOCKS, layers)
    blocks = [i * layers // count for i in range(count)]
    if not count or any(f"blocks.{i}.{tensor}" not in present for i in blocks for tensor in TENSORS):
        return None
    found = [[read(f"blocks.{i}.{tensor}") for i in blocks] for tensor in TENSORS]
    if not all(tensor.is_floating_point() for row in found for tensor in row):
        return None
    samples = [[x for tensor in row for x in _places(tensor)] for row in found]
    width = found[0][0].shape[-1]
    return Fingerprint(model, width, layers, tuple(tuple(row) for row in samples))


def _places(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    at = [(2 * i + 1) * flat.numel() // (2 * PLACES) for i in range(PLACES)]
    return [float(f"{x:.6g}") for x in flat[at].double().tolist()]


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    apart, size = math.dist(a, b), max(math.hypot(*a), math.hypot(*b))
    return apart / size if size else 0.0
