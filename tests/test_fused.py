"""Attention straight from projections against norm, rotation and the attention reference done one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from t3 import Grid, Partition
from t3.backends import Backend
from t3.errors import T3Error
from t3.fused import attention_from_projections, refusal
from t3.kernels.attention.naive import t3_attention_reference
from t3.windows import groupings, token_rows, window_indices

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
CPU = torch.device("cpu")


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(grid, *, batch=1, heads=2, head_dim=16, dtype=torch.float32, seed=0, beside=0):
    """q, k, v and the other arguments of a call; beside: how many tokens more than the grid's."""
    tokens, width = Grid(*grid).tokens + beside, heads * head_dim
    q, k, v = (random(batch, tokens, width, seed=seed + i, dtype=dtype) for i in range(3))
    norms = tuple(1 + random(width, seed=seed + i, dtype=dtype) / 4 for i in (3, 4))
    angle = random(1, tokens, head_dim // 2, seed=seed + 5).double() * 3
    wide = torch.promote_types(dtype, torch.float32)
    turns = (angle.cos().to(wide), angle.sin().to(wide))
    return (q, k, v), {"heads": heads, "norms": norms, "turns": turns}


def reference(qkv, grid, partition, *, heads, norms=None, turns=None, eps=1e-6, scale=None, prefix=0, suffix=0):
    """In float64; the rotation as a product of complex numbers."""
    q, k, v = (x.double() for x in qkv)
    if norms is not None:
        q, k = (
            x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w.double()
            for x, w in zip((q, k), norms, strict=True)
        )
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    if turns is not None:
        turn = torch.complex(*(table.double() for table in turns))[:, :, None]
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for x in (q, k)
        )
    assert q.shape[1] == prefix + Grid(*grid).tokens + suffix
    return t3_attention_reference(q, k, v, grid, partition, prefix=prefix, scale=scale).flatten(2)


def error(out, truth):
    assert out.shape == truth.shape
    assert torch.isfinite(out).all()
    return ((out.double() - truth).norm() / truth.norm()).item()


@st.composite
def cases(draw):
    grid = Grid(*(draw(st.integers(1, 6)) for _ in range(3)))
    partition = Partition(*(draw(st.integers(1, n)) for n in grid))
    return grid, partition, draw(st.integers(1, 2)), draw(st.sampled_from(list(ROUNDOFF))), draw(st.integers(0, 2**31))


@given(case=cases())
@settings(max_examples=100)
def test_equals_the_reference(case):
    grid, partition, batch, dtype, seed = case
    qkv, more = inputs(grid, batch=batch, dtype=dtype, seed=seed)
    out = attention_from_projections(*qkv, grid, partition, **more)
    assert out.dtype == dtype
    assert error(out, reference(qkv, grid, partition, **more)) < 16 * ROUNDOFF[dtype]


@given(case=cases(), prefix=st.integers(0, 9), suffix=st.integers(0, 9), room=st.integers(1, 2**16))
@settings(max_examples=100)
def test_tokens_beside_the_grid_equal_the_reference(case, prefix, suffix, room):
    """room: bytes for windows joined with these tokens; from one window of one head to all windows at once."""
    grid, partition, batch, dtype, seed = case
    qkv, more = inputs(grid, batch=batch, dtype=dtype, seed=seed, beside=prefix + suffix)
    more |= {"prefix": prefix, "suffix": suffix}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t3.memory.JOINED_BYTES", room)
        out = attention_from_projections(*qkv, grid, partition, **more)
    assert out.dtype == dtype and out.is_contiguous()
    assert error(out, reference(qkv, grid, partition, **more)) < 16 * ROUNDOFF[dtype]


@pytest.mark.parametrize("beside", [(5, 0), (0, 5), (3, 2)])
def test_every_token_beside_the_grid_counts(beside):
    """It changes every window's result, and its own result depends on every token."""
    grid, partition, (prefix, suffix) = (3, 5, 7), (2, 3, 2), beside
    (q, k, v), more = inputs(grid, beside=5, dtype=torch.float64)
    more |= {"prefix": prefix, "suffix": suffix}
    before = attention_from_projections(q, k, v, grid, partition, **more)
    own = [*range(prefix), *range(prefix + 105, 110)]
    for token in own:
        changed = v.clone()
        changed[:, token] += 1
        after = attention_from_projections(q, k, changed, grid, partition, **more)
        assert ((after - before).abs().amax(-1) > 1e-9).all()
    for token in range(prefix, prefix + 105, 13):
        changed = v.clone()
        changed[:, token] += 1
        after = attention_from_projections(q, k, changed, grid, partition, **more)
        moved = (after - before).abs().amax(-1)[0] > 1e-9
        assert moved[own].all() and not moved.all()


def test_windows_joined_with_other_tokens_stay_within_their_room(monkeypatch):
    grid, partition, seen = (2, 6, 6), (1, 3, 3), []

    def attend(q, k, v, scale):
        seen.append((k.shape[0] * k.shape[2], 2 * k.numel() * k.element_size()))
        return torch.zeros_like(q)

    (q, k, v), more = inputs(grid, batch=2, heads=4, beside=40)
    looking = Backend("looking", "", attend)
    one = 2 * (8 + 40) * 16 * 4  # a window of one head: keys and values
    for room in (1, one, 5 * one, 2**30):
        seen.clear()
        monkeypatch.setattr("t3.memory.JOINED_BYTES", room)
        attention_from_projections(q, k, v, grid, partition, **more, prefix=40, backend=looking)
        windows = seen[:-1]  # the last are the queries of those tokens
        assert sum(count for count, _ in windows) == 2 * 2 * 9 * 4
        bound = max(one, min(room, 2 * 2 * 72 * 64 * 4))
        assert max(size for _, size in windows) <= bound
        assert max(size for _, size in windows) > bound / 2 or max(count for count, _ in windows) == 9 * 4


@pytest.mark.parametrize("left_out", ["norms", "turns"])
def test_norm_and_rotation_may_be_missing(left_out):
    qkv, more = inputs((3, 5, 7))
    del more[left_out]
    out = attention_from_projections(*qkv, (3, 5, 7), (2, 3, 2), **more, scale=0.7)
    assert error(out, reference(qkv, (3, 5, 7), (2, 3, 2), **more, scale=0.7)) < 1e-6


@pytest.mark.parametrize("partition", [(1, 1, 1), (3, 1, 1), (2, 3, 4)])
def test_slices_of_a_fused_projection(partition):
    grid = (3, 5, 7)
    qkv, more = inputs(grid, batch=2)
    slices = torch.cat(qkv, dim=-1).chunk(3, dim=-1)
    before = [x.clone() for x in slices]
    out = attention_from_projections(*slices, grid, partition, **more)
    assert torch.equal(out, attention_from_projections(*qkv, grid, partition, **more))
    assert all(torch.equal(x, y) for x, y in zip(slices, before, strict=True))


def test_windows_in_place_are_not_copied():
    grid, seen = (3, 4, 5), []

    def attend(q, k, v, scale):
        seen.append(v.untyped_storage().data_ptr())
        return torch.zeros_like(q)

    (q, k, v), more = inputs(grid, batch=2)
    attention_from_projections(q, k, v, grid, (3, 1, 1), **more, backend=Backend("looking", "", attend))
    assert seen == [v.untyped_storage().data_ptr()]


def test_launches_stay_legal(monkeypatch):
    """Kernels put windows x heads on a launch dimension that ends somewhere."""
    qkv, more = inputs((2, 4, 6), batch=2)
    whole = attention_from_projections(*qkv, (2, 4, 6), (1, 2, 3), **more)
    monkeypatch.setattr("t3.fused.MOST_BATCH_HEADS", 10)
    assert torch.allclose(attention_from_projections(*qkv, (2, 4, 6), (1, 2, 3), **more), whole, atol=1e-6)


@given(st.data())
@settings(max_examples=100)
def test_rows_are_those_of_the_windows(data):
    grid = Grid(*(data.draw(st.integers(1, 7)) for _ in range(3)))
    partition = Partition(*(data.draw(st.integers(1, n)) for n in grid))
    batch = data.draw(st.integers(1, 3))
    found = token_rows(tuple(grid), tuple(partition), batch, CPU)
    kinds = groupings(grid, partition)
    assert len(found) == len(kinds)
    for kind, rows in zip(kinds, found, strict=True):
        tokens = torch.arange(batch * grid.tokens).view(batch, -1)
        placed = torch.empty(batch * grid.tokens, dtype=torch.long)
        if rows is None:
            placed = tokens.flatten()
        else:
            assert rows.dtype == torch.int32
            placed[rows.flatten().long()] = tokens.flatten()
        parts = [
            (index[None] + grid.tokens * torch.arange(batch)[:, None, None]).flatten()
            for index in window_indices(tuple(grid), tuple(partition), kind, CPU)
        ]
        assert torch.equal(placed, torch.cat(parts))


@pytest.mark.parametrize("beside", [(0, 0), (4, 3)], ids=["alone", "tokens beside"])
@pytest.mark.parametrize("partition", [(3, 1, 1), (2, 3, 2), (1, 5, 1)])
def test_compiles_without_a_graph_break(partition, beside):
    torch._dynamo.reset()
    qkv, more = inputs((3, 5, 7), batch=2, beside=sum(beside))
    more |= {"prefix": beside[0], "suffix": beside[1]}

    def run(q, k, v):
        return attention_from_projections(q * 2, k, v, (3, 5, 7), partition, **more, backend="sdpa")

    seen = []

    def keep(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, example)

    compiled = torch.compile(run, fullgraph=True, backend=keep)
    assert error(compiled(*qkv), run(*qkv).double()) < 1e-6
    # Attention is one operator: no compiler looks into a backend.
    assert any("attend_windows" in target for target in seen) and not any("dot_product" in target for target in seen)


def test_refuses_in_words():
    x = torch.zeros(1, 4, 8)
    assert "gradients" in refusal(x.clone().requires_grad_())
    assert "Triton" in refusal(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": (3, 5, 8)}, "120 tokens but q has 105"),
        ({"prefix": 3}, "105 tokens, with 3 before and 0 after it, but q has 105"),
        ({"prefix": -3, "suffix": 3}, "with -3 before"),
        ({"partition": (4, 1, 1)}, "4 windows along t.*Nearest: 3"),
        ({"heads": 3}, "not 3 heads"),
        ({"k": torch.zeros(1, 104, 32)}, "expected three equal"),
        ({"v": torch.zeros(1, 105, 32, dtype=torch.float64)}, "one float dtype"),
        ({"turns": (torch.zeros(1, 105, 16),) * 2}, r"expected \[1 or B, 105, 8\]"),
    ],
)
def test_bad_arguments_are_named(change, words):
    (q, k, v), more = inputs((3, 5, 7))
    with pytest.raises(T3Error, match=words):
        attention_from_projections(
            **{"q": q, "k": k, "v": v, "grid": (3, 5, 7), "partition": (1, 2, 2), **more, **change}
        )
