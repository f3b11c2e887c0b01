"""A change of one weight as a product of two thin matrices: how many columns it needs, and what is lost.

Everything is float32, but for one sum of squares, where float32 would lose the small singular values.
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
# A sketch of a few columns is many times cheaper than all singular values, as long as they are few.
_SKETCH_PART, _EXTRA, _PASSES = 16, 10, 3
# Left and right factors, most important first, and for each number of columns the relative error that is left.
Parts = tuple["torch.Tensor", "torch.Tensor", "list[float]"]
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
        left, right = _leading(delta, rank)
        return _stored(delta, left, right, dtype)


def by_error(
    delta: torch.Tensor, error: float, limit: int, dtype: torch.dtype, *, best: bool = False
) -> Factors | None:
    """The product of the lowest rank whose error is at most `error`.

    When no rank up to `limit` is enough: None, or with `best` what `limit` gives. A sketch may give a rank one or two
    higher than the lowest.
    """
    if limit < 1:
        return None
    # Cutting and rounding are independent, so their squares add up.
    goal = math.sqrt(max(error**2 - ROUNDING[str(dtype).removeprefix("torch.")] ** 2, (error / 2) ** 2))
    with exact_products():
        few = min(limit, min(delta.shape) // _SKETCH_PART)
        found = _cut(delta, _sketch(delta, few), error, goal, few, dtype, best and few == limit) if few else None
        if found is None and few < limit:
            found = _cut(delta, _all(delta), error, goal, limit, dtype, best)
        return found


def _cut(
    delta: torch.Tensor, parts: Parts, error: float, goal: float, limit: int, dtype: torch.dtype, best: bool
) -> Factors | None:
    """The first columns that are enough; see `by_error` for where they are not."""
    left, right, tail = parts
    rank = next((r for r in range(1, len(tail)) if tail[r] <= goal), None)
    while rank is not None and rank <= limit:
        found = _stored(delta, left[:, :rank], right[:rank], dtype)
        if found.error <= error:
            return found
        rank += 1 + rank // 50
    return _stored(delta, left[:, :limit], right[:limit], dtype) if best else None


def _leading(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if rank <= min(delta.shape) // _SKETCH_PART:
        left, right, _ = _sketch(delta, rank)
    else:
        left, right, _ = _all(delta)
    return left[:, :rank], right[:rank]


def _sketch(delta: torch.Tensor, rank: int) -> Parts:
    """About the first `rank` singular vectors, by the randomised range finder (Halko, Martinsson, Tropp 2011)."""
    import torch

    columns = min(*delta.shape, rank + _EXTRA + rank // 4)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same start on every device
    start = torch.randn(delta.shape[1], columns, generator=generator).to(delta.device)
    basis = torch.linalg.qr(delta @ start).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    small, sizes, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    left = basis @ small
    # What the basis misses is measured, not taken as a difference of two sums of nearly the same size.
    missed = _distance(delta, left * sizes, right) ** 2
    return left * sizes, right, _tails(sizes.double() ** 2, missed, _norm(delta) ** 2)


def _all(delta: torch.Tensor) -> Parts:
    """All singular vectors, from the eigenvectors of the smaller Gram matrix.

    Several times faster than an SVD. The Gram matrix squares the singular values, so float64 is what keeps those of
    1e-7 of the largest.
    """
    import torch

    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=delta.device)
    for rows in tall.split(max(1, _CHUNK // tall.shape[1])):
        wide = rows.double()
        gram.addmm_(wide.T, wide)
    squares, vectors = torch.linalg.eigh(gram)
    del gram
    squares, basis = squares.flip(0).clamp_min(0), vectors.flip(1).float()
    projected = tall @ basis
    tails = _tails(squares, 0.0, float(squares.sum()))
    return (projected, basis.T, tails) if tall is delta else (basis, projected.T, tails)


def _tails(squares: torch.Tensor, missed: float, total: float) -> list[float]:
    left = squares.flip(0).cumsum(0).flip(0)
    values = [*left.tolist(), 0.0]
    return [math.sqrt((value + missed) / total) if total else 0.0 for value in values]


def _stored(delta: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Factors:
    """Both factors at the same size, column by column, which is where formats round best; and the error they have."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    # A column of no length (a rank above that of the change) stays zero.
    tiny = 1e-30
    up = (left * (b / a.clamp_min(tiny)).sqrt()).to(dtype)
    down = (right * (a / b.clamp_min(tiny)).sqrt()[:, None]).to(dtype)
    size = _norm(delta)
    return Factors(up, down, _distance(delta, up.float(), down.float()) / size if size else 0.0)


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
