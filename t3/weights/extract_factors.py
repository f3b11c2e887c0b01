"""A change of one weight as a product of two thin matrices: how many columns it needs, and what is lost.

The columns are eigenvectors of the smaller Gram matrix: one large product and work on a small matrix, several times
faster than a singular value decomposition. It squares the singular values: in float64 those of 1e-7 of the largest are
kept; in float32, which is three times faster again, those of 3e-4, less than bfloat16 factors lose by their rounding.
Whatever finds the columns, what is lost is measured on their product.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What storing both factors in a format adds to the relative error, at most: rounding is at most 2^-9 (bfloat16) or
# 2^-12 (float16) of each number, and a bit over half of that in the root mean square.
ROUNDING = {"bfloat16": 0.003, "float16": 0.0004, "float32": 2e-7}
_COARSE = 0.003  # rounding from which on a Gram matrix in float32 is as good as one in float64
# A sketch of a few columns is many times cheaper than all eigenvectors, as long as they are few.
_SKETCH_PART, _EXTRA, _PASSES = 16, 10, 4
_CHUNK = 2**24  # elements that are converted to float64, or multiplied out, at once


@dataclass(frozen=True)
class Factors:
    """`up @ down` is the change, in the stored format. `error`: relative Frobenius error, rounding included."""

    up: torch.Tensor
    down: torch.Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def break_even(rows: int, columns: int) -> int:
    """The highest rank at which two factors are smaller than the matrix itself; 0 where none is."""
    return max(0, math.ceil(rows * columns / (rows + columns)) - 1)


def by_rank(delta: torch.Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """The nearest product of this rank (to a fraction of a per cent where it is found by a sketch)."""
    with exact_products():
        change = _Change(delta, dtype)
        basis, _ = change.sketch(rank) if rank <= change.few else change.all()
        return change.stored(basis[:, :rank])


def by_error(
    delta: torch.Tensor, error: float, limit: int, dtype: torch.dtype, *, best: bool = False
) -> Factors | None:
    """The product of the lowest rank whose error is at most `error`.

    When no rank up to `limit` is enough: None, or with `best` what `limit` gives. A sketch may give a rank one or two
    higher than the lowest.
    """
    if limit < 1:
        return None
    with exact_products():
        change = _Change(delta, dtype)
        few = min(limit, change.few)
        found = _cut(change, *change.sketch(few), error, few, best and few == limit) if few else None
        if found is None and few < limit:
            found = _cut(change, *change.all(), error, limit, best)
        return found


def _cut(
    change: _Change, basis: torch.Tensor, tail: list[float], error: float, limit: int, best: bool
) -> Factors | None:
    """The first columns that are enough; see `by_error` for where they are not."""
    # Cutting and rounding are independent, so their squares add up.
    goal = math.sqrt(max(error**2 - change.rounding**2, (error / 2) ** 2))
    rank = next((r for r in range(1, len(tail)) if tail[r] <= goal), None)
    while rank is not None and rank <= limit:
        found = change.stored(basis[:, :rank])
        if found.error <= error:
            return found
        rank += 1 + rank // 50
    return change.stored(basis[:, :limit]) if best else None


class _Change:
    """One change and its Gram matrix, scaled to a trace of 1 so that no square overflows or vanishes.

    `sketch` and `all` give orthonormal columns, most important first, and for each number of them the relative error
    that is left.
    """

    def __init__(self, delta: torch.Tensor, dtype: torch.dtype) -> None:
        import torch

        self.delta, self.dtype = delta, dtype
        self.rounding = ROUNDING[str(dtype).removeprefix("torch.")]
        self.size = _norm(delta)
        self.few = min(delta.shape) // _SKETCH_PART
        self.is_tall = delta.shape[0] >= delta.shape[1]
        self.tall = delta if self.is_tall else delta.T
        work = torch.float32 if self.rounding >= _COARSE else torch.float64
        width = self.tall.shape[1]
        self.gram = torch.zeros(width, width, dtype=work, device=delta.device)
        for rows in self.tall.split(max(1, _CHUNK // width)):
            scaled = rows.to(work) / (self.size or 1.0)
            self.gram.addmm_(scaled.T, scaled)

    def sketch(self, count: int) -> tuple[torch.Tensor, list[float]]:
        """About the first `count` of `all`, by subspace iteration (Halko, Martinsson, Tropp 2011)."""
        import torch

        width = len(self.gram)
        columns = min(width, count + _EXTRA + count // 4)
        generator = torch.Generator().manual_seed(0)  # on the CPU: the same start on every device
        basis = torch.randn(width, columns, generator=generator).to(self.gram)
        for _ in range(_PASSES):
            basis = torch.linalg.qr(self.gram @ basis).Q
        squares, turn = torch.linalg.eigh(basis.T @ (self.gram @ basis))
        missed = float(self.gram.trace() - squares.sum())
        return (basis @ turn.flip(1)).float(), _tails(squares, missed)

    def all(self) -> tuple[torch.Tensor, list[float]]:
        """All of them."""
        import torch

        squares, basis = torch.linalg.eigh(self.gram)
        return basis.flip(1).float(), _tails(squares, 0.0)

    def stored(self, basis: torch.Tensor) -> Factors:
        """The change as far as `basis` goes, as two factors in the stored format.

        Both are of the same size, column by column, which is where formats round best.
        """
        import torch

        projected = self.tall @ basis
        # A column of no length (a rank above that of the change) stays zero.
        half = torch.linalg.vector_norm(projected, dim=0, dtype=torch.float64).clamp_min(1e-30).sqrt().float()
        projected, basis = (projected / half).to(self.dtype), (basis * half).to(self.dtype)
        up, down = (projected, basis.T) if self.is_tall else (basis, projected.T)
        error = _distance(self.delta, up.float(), down.float()) / self.size if self.size else 0.0
        return Factors(up, down, error)


def _tails(squares: torch.Tensor, missed: float) -> list[float]:
    """Relative error after each number of columns. `squares`: ascending, of a sum of 1 with what was missed."""
    left = squares.double().clamp_min(0).cumsum(0).flip(0)
    return [math.sqrt(max(0.0, value + missed)) for value in [*left.tolist(), 0.0]]


def _distance(delta: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """Frobenius norm of `delta - up @ down`, some rows at a time."""
    rows = max(1, _CHUNK // delta.shape[1])
    parts = zip(delta.split(rows), up.split(rows), strict=True)
    return math.sqrt(sum(_norm(part - some @ down) ** 2 for part, some in parts))


def _norm(tensor: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32, also where the program around us has allowed TF32."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
