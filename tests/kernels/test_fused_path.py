"""The whole path from projections to merged windows by Triton's kernels, tokens beside the grid included, in float64's
company: by attention over all at once, and by chunks and groups of heads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from t3 import Grid, Partition
from t3.backends import BACKENDS
from t3.block import Linear, Projections, Windows, attend
from t3.fused import attention_from_projections
from t3.memory import Share

sys.path.append(str(Path(__file__).resolve().parents[1]))
from test_fused import error, inputs, reference

CASES = [((3, 1, 5), (2, 1, 2)), ((3, 2, 3), (3, 1, 1))]
BESIDE = [(5, 0), (0, 6), (3, 4)]
HEADS, HEAD_DIM = 3, 64
# float32 after a projection, a norm and attention; a token out of place is 1e-2 and more.
ROUNDING = 1e-5


@pytest.fixture
def by_triton(device, monkeypatch):
    """Counts launches; on a CPU the kernels are taken too, in the interpreter."""
    from t3.kernels.window_group import kernel as group
    from t3.kernels.window_merge import kernel as merge

    for place in ("t3.fused", "t3.kernels.window_group.op", "t3.kernels.window_merge.op"):
        monkeypatch.setattr(f"{place}.triton_usable", lambda where, dtype: dtype.itemsize <= 4)
    seen = []
    for module, name in ((group, "window_group"), (merge, "window_merge")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, name=name, **k: seen.append(name) or own(*a, **k))
    return seen


def case(device, grid, beside, batch):
    qkv, more = inputs(grid, batch=batch, heads=HEADS, head_dim=HEAD_DIM, beside=sum(beside))
    more |= {"norms": tuple(x.to(device) for x in more["norms"]), "turns": tuple(x.to(device) for x in more["turns"])}
    return [x.to(device) for x in qkv], more


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("beside", [(0, 0), *BESIDE], ids=str)
@pytest.mark.parametrize(("grid", "partition"), CASES)
def test_all_heads_at_once(device, by_triton, grid, partition, beside, batch):
    qkv, more = case(device, grid, beside, batch)
    more |= {"prefix": beside[0], "suffix": beside[1]}
    out = attention_from_projections(*qkv, grid, partition, **more)
    assert "window_group" in by_triton
    assert error(out, reference(qkv, grid, partition, **more)) < ROUNDING


@pytest.mark.parametrize("beside", BESIDE, ids=str)
@pytest.mark.parametrize(("grid", "partition"), CASES)
def test_by_chunks_and_heads(device, by_triton, grid, partition, beside):
    prefix, suffix = beside
    (x, *_), more = case(device, grid, beside, 2)
    tokens, width = x.shape[1:]
    weights = [torch.randn(width, width, generator=torch.Generator().manual_seed(i)).to(device) / 14 for i in range(3)]
    truth = reference([x @ w.T for w in weights], grid, partition, **more, prefix=prefix, suffix=suffix)
    projections = Projections(
        tuple(x.shape),
        x,
        lambda rows: x[:, rows],
        *(Linear(lambda y, w=w: y @ w.T, w) for w in weights),
        HEADS,
        more["norms"],
        1e-6,
        more["turns"],
    )
    windows = Windows(Grid(*grid), Partition(*partition), BACKENDS["sdpa"], prefix)
    some = [slice(0, 4), slice(4, tokens - 2), slice(tokens - 2, tokens)]
    for share in (Share(), Share(1, 2)):
        assert error(attend(projections, windows, share, some), truth) < ROUNDING
    assert by_triton
