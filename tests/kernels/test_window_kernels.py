"""`window_group` and `window_merge` by Triton against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from t3.kernels.window_group import naive as group_naive
from t3.kernels.window_merge import naive as merge_naive
from t3.windows import token_rows

# Unit roundoff; Triton's interpreter cuts bfloat16 off instead of rounding it, which is twice that.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDOFF)
GRIDS = [
    ((2, 4, 6), (1, 2, 3)),
    ((3, 5, 7), (2, 3, 2)),
    ((3, 4, 5), (3, 1, 1)),
    ((4, 3, 2), (2, 1, 1)),
    ((1, 3, 3), (1, 3, 1)),
]


@pytest.fixture(scope="session")
def window_group(device):
    from t3.kernels.window_group.kernel import window_group

    return window_group


@pytest.fixture(scope="session")
def window_merge(device):
    from t3.kernels.window_merge.kernel import window_merge

    return window_merge


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def turns(tokens, head_dim, device, batch=1, seed=3):
    """Rotations as ComfyUI lays them out, `[batch, N, 1, pairs, 2, 2]`, and the two views of them."""
    angle = random(batch, tokens, 1, head_dim // 2, device=device, seed=seed) * 3
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    return matrix[:, :, 0, :, 0, 0], matrix[:, :, 0, :, 1, 0]


def close(out, truth, dtype):
    assert out.dtype == dtype and out.shape == truth.shape
    assert torch.isfinite(out).all()
    off = (out.double() - truth).abs()
    assert (off <= 2 * ROUNDOFF[dtype] * truth.abs() + 1e-6 * truth.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "partition"), GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_group_equals_the_truth(device, window_group, dtype, grid, partition, batch):
    tokens, head_dim, heads = grid[0] * grid[1] * grid[2], 64, 3
    x = random(batch, tokens, heads * head_dim, dtype=dtype, device=device)
    weight = random(heads * head_dim, dtype=dtype, device=device, seed=1)
    rows = list(token_rows(grid, partition, batch, torch.device(device)))
    arguments = (rows, weight, 1e-6, *turns(tokens, head_dim, device))
    outs = window_group(x, *arguments)
    truth = group_naive.window_group(x.double(), *arguments)
    assert len(outs) == len(rows)
    for out, exact in zip(outs, truth, strict=True):
        close(out, exact, dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("what", ["norm and turn", "norm", "turn", "neither"])
def test_group_by_head_size_and_task(device, window_group, head_dim, heads, what):
    x = random(1, 24, heads * head_dim, device=device)
    rows = list(token_rows((2, 3, 4), (1, 3, 2), 1, torch.device(device)))
    weight = random(heads * head_dim, device=device, seed=1) if "norm" in what else None
    tables = turns(24, head_dim, device) if "turn" in what else (None, None)
    outs = window_group(x, rows, weight, 1e-6, *tables)
    for out, exact in zip(outs, group_naive.window_group(x.double(), rows, weight, 1e-6, *tables), strict=True):
        close(out, exact, torch.float32)
        if what == "neither":
            assert torch.equal(out.double(), exact)


@pytest.mark.parametrize("how", ["fused projection", "channels apart", "every other sample", "half the tokens"])
@pytest.mark.parametrize("table", ["host", "diffusers", "one per sample", "half precision"])
def test_group_reads_any_strides(device, window_group, how, table):
    tokens, width, head_dim = 3 * 4 * 5, 192, 64
    x = random(2, tokens, width, device=device)
    if how == "fused projection":
        strange = torch.cat([x + 1, x, x - 1], dim=-1)[..., width : 2 * width]
    elif how == "channels apart":
        strange = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif how == "every other sample":
        strange = torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2]
    else:
        strange = torch.cat([x, x + 1], dim=1)[:, :tokens]
    assert not strange.is_contiguous()
    cos, sin = turns(tokens, head_dim, device, batch=2 if table == "one per sample" else 1)
    if table == "diffusers":
        cos, sin = cos.repeat_interleave(2, dim=-1)[..., 0::2], sin.repeat_interleave(2, dim=-1)[..., 1::2]
    elif table == "half precision":
        cos, sin = cos.half(), sin.half()
    weight = random(width, device=device, seed=1)
    rows = list(token_rows((3, 4, 5), (1, 2, 2), 2, torch.device(device)))
    before = strange.clone()
    outs = window_group(strange, rows, weight, 1e-6, cos, sin)
    assert torch.equal(strange, before)
    for out, exact in zip(outs, group_naive.window_group(x.double(), rows, weight, 1e-6, cos, sin), strict=True):
        close(out, exact, torch.float32)


@pytest.mark.parametrize("warps", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_how_work_is_cut_changes_no_row(device, window_group, window_merge, warps, tokens):
    x = random(2, 30, 128, dtype=torch.float16, device=device)
    rows = list(token_rows((2, 3, 5), (1, 2, 2), 2, torch.device(device)))
    arguments = (rows, random(128, device=device, seed=1), 1e-6, *turns(30, 64, device))
    outs = window_group(x, *arguments, warps=warps, tokens=tokens)
    for out, exact in zip(outs, group_naive.window_group(x.double(), *arguments), strict=True):
        close(out, exact, torch.float16)
    assert torch.equal(window_merge(outs, rows, 2, warps=warps, tokens=tokens), merge_naive.window_merge(outs, rows, 2))


def test_group_s_values_may_be_extreme(device, window_group):
    """Zero rows stay zero; large values do not overflow in the sum of their squares."""
    x = random(1, 4, 128, dtype=torch.bfloat16, device=device)
    x[0, 0], x[0, 1] = 0.0, x[0, 1] * 1e17
    weight = torch.ones(128, device=device)
    (out,) = window_group(x, [None], weight, 1e-6)
    (exact,) = group_naive.window_group(x.double(), [None], weight, 1e-6)
    close(out, exact, torch.bfloat16)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "partition"), GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_merge_equals_the_truth(device, window_merge, dtype, grid, partition, batch):
    rows = list(token_rows(grid, partition, batch, torch.device(device)))
    count = batch * grid[0] * grid[1] * grid[2]
    parts = [random(count, 192, dtype=dtype, device=device, seed=seed) for seed in range(len(rows))]
    out = window_merge(parts, rows, batch)
    truth = merge_naive.window_merge([part.double() for part in parts], rows, batch)
    close(out, truth, dtype)
    if device == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(out, merge_naive.window_merge(parts, rows, batch))


@pytest.mark.parametrize("moved", [(True, False), (False, True), (False, False)])
def test_merge_where_either_part_stays(device, window_merge, moved):
    parts = [random(48, 64, device=device, seed=seed) for seed in range(2)]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3)).to(torch.int32).view(2, 24).to(device)
    rows = [order if moves else None for moves in moved]
    assert torch.equal(window_merge(parts, rows, 2), merge_naive.window_merge(parts, rows, 2))


def test_grouped_and_merged_is_what_it_was(device, window_group, window_merge):
    x = random(2, 105, 192, dtype=torch.bfloat16, device=device)
    rows = list(token_rows((3, 5, 7), (2, 3, 2), 2, torch.device(device)))
    assert torch.equal(window_merge(window_group(x, rows), rows, 2), x)


@pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 3)], ids=["one head", "two heads"])
@pytest.mark.parametrize("what", ["norm and turn", "neither"])
@pytest.mark.parametrize(("grid", "partition"), GRIDS)
def test_group_in_parts_into_tensors_that_are_there(device, window_group, grid, partition, heads, what):
    """Some heads and some tokens at a time, the norm's root handed in: what all at once would give."""
    tokens, head_dim = grid[0] * grid[1] * grid[2], 64
    x = random(2, tokens, 3 * head_dim, device=device)
    weight = random(3 * head_dim, device=device, seed=1)
    tables = turns(tokens, head_dim, device)
    rows = list(token_rows(grid, partition, 2, torch.device(device)))
    arguments = (weight, 1e-6, *tables) if what != "neither" else ()
    truth = group_naive.window_group(x.double(), rows, *arguments)
    channels = slice(heads.start * head_dim, heads.stop * head_dim)
    width = channels.stop - channels.start
    # A place in the middle of wider rows, as the slots of some heads are.
    stores = [random(2, tokens, width + 16, device=device, seed=9) for _ in rows]
    before = [store.clone() for store in stores]
    inverse = torch.rsqrt(x.pow(2).mean(-1) + 1e-6)
    cut = tokens // 2 + 1
    for some in (slice(0, cut), slice(cut, tokens)):
        outs = [
            store[:, some, 8 : 8 + width] if at is None else store.flatten(0, 1)[:, 8 : 8 + width]
            for store, at in zip(stores, rows, strict=True)
        ]
        more = {}
        if what != "neither":
            cos, sin = (table[:, some] for table in tables)
            more = {"weight": weight[channels], "cos": cos, "sin": sin, "inverse": inverse[:, some]}
        at = [None if to is None else to[:, some] for to in rows]
        assert window_group(x[:, some, channels], at, outs=outs, **more) is outs
    for store, old, exact in zip(stores, before, truth, strict=True):
        close(store[..., 8 : 8 + width].flatten(0, 1), exact[:, channels], torch.float32)
        assert torch.equal(store[..., :8], old[..., :8]) and torch.equal(store[..., -8:], old[..., -8:])


@pytest.mark.parametrize("width", [64, 192, 320])
@pytest.mark.parametrize(("grid", "partition"), GRIDS)
def test_merge_into_a_slot(device, window_merge, grid, partition, width):
    rows = list(token_rows(grid, partition, 2, torch.device(device)))
    tokens = grid[0] * grid[1] * grid[2]
    parts = [random(2 * tokens, width, device=device, seed=seed) for seed in range(len(rows))]
    store = random(2, tokens, width + 16, device=device, seed=9)
    before = store.clone()
    window_merge(parts, rows, 2, out=store[..., 8 : 8 + width])
    assert torch.equal(store[..., 8 : 8 + width], merge_naive.window_merge(parts, rows, 2))
    assert torch.equal(store[..., :8], before[..., :8]) and torch.equal(store[..., -8:], before[..., -8:])


@pytest.fixture
def poisoned():
    """New memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("grid", "partition"), GRIDS)
def test_every_row_is_written(device, window_group, window_merge, poisoned, grid, partition):
    count = grid[0] * grid[1] * grid[2]
    rows = list(token_rows(grid, partition, 2, torch.device(device)))
    outs = window_group(random(2, count, 192, device=device), rows)
    assert all(torch.isfinite(out).all() for out in outs)
    assert torch.isfinite(window_merge(outs, rows, 2)).all()


@pytest.mark.parametrize("normed", [False, True])
def test_offsets_are_64_bit(device, window_group, normed):
    """Rows 2^31 elements apart. Memory that is not touched costs nothing, on a CPU; a card with less skips."""
    try:
        x = torch.empty(2, 2**31, dtype=torch.float16, device=device)[None, :, -128:]
    except RuntimeError as error:  # out of memory
        pytest.skip(str(error))
    x.copy_(random(1, 2, 128, dtype=torch.float16, device=device))
    arguments = (torch.ones(128, device=device), 1e-6) if normed else ()
    (out,) = window_group(x, [None], *arguments)
    close(out, group_naive.window_group(x.double(), [None], *arguments)[0], torch.float16)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("ranks", "groups", "each"), [(2, 3, 1), (3, 1, 2), (2, 2, 3)])
@pytest.mark.parametrize("given", [False, True])
def test_group_writes_pieces_for_other_ranks(device, window_group, batch, ranks, groups, each, given):
    tokens, head_dim = 30, 32
    width = ranks * groups * each * head_dim
    x = random(batch, tokens, width, dtype=torch.bfloat16, device=device)
    weight = random(width, dtype=torch.bfloat16, device=device, seed=1)
    inverse = random(batch, tokens, device=device, seed=2).abs() if given else None
    arguments = ([None], weight, 1e-6, *turns(tokens, head_dim, device), inverse)
    # Of some of the tokens, with others before and after.
    packed = torch.full((batch, groups, ranks, tokens + 5, each * head_dim), 7.0, dtype=x.dtype, device=device)
    view = packed.permute(0, 3, 2, 1, 4)
    window_group(x, *arguments, outs=[view[:, 2 : tokens + 2]])
    (exact,) = group_naive.window_group(x.double(), *arguments)
    close(view[:, 2 : tokens + 2].flatten(2), exact.unflatten(0, (batch, tokens)), torch.bfloat16)
    assert (view[:, :2] == 7).all() and (view[:, tokens + 2 :] == 7).all()
    other = torch.empty_like(packed).permute(0, 3, 2, 1, 4)[:, :tokens]
    group_naive.window_group(x, *arguments, outs=[other])
    close(other.flatten(2), exact.unflatten(0, (batch, tokens)), torch.bfloat16)
