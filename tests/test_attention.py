"""The T3 operation against its float64 reference, and against constructions that share nothing with either."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3 import Grid, Partition, Plan, t3_attention
from t3.attention import _groups
from t3.backends import BACKENDS, Backend, choose
from t3.errors import T3Error
from t3.kernels.attention.naive import dense_attention, local_groups, strided_groups, t3_attention_reference, windows
from t3.windows import LOCAL, STRIDED, groupings, window_indices

# Unit roundoff of the dtype. Scores and weighted sums accumulate in float32 or better, so that the relative error of
# an average of random values is a small multiple of rounding the result, q/k products and the weights once each.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def tolerance(dtype):
    return 16 * max(ROUNDOFF[dtype], 2.0**-53)


def error(out, reference):
    assert out.shape == reference.shape
    assert torch.isfinite(out).all()
    return ((out.double() - reference).norm() / reference.norm()).item()


def random_qkv(tokens, *, batch=1, heads=2, head_dim=16, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]


@st.composite
def cases(draw):
    grid = Grid(*(draw(st.integers(1, 7)) for _ in range(3)))
    partition = Partition(*(draw(st.integers(1, n)) for n in grid))
    return {
        "grid": grid,
        "partition": partition,
        "prefix": draw(st.integers(0, 4)),
        "suffix": draw(st.integers(0, 4)),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(list(ROUNDOFF))),
        "seed": draw(st.integers(0, 2**31)),
    }


def draw_qkv(case, device):
    tokens = case["prefix"] + case["grid"].tokens + case["suffix"]
    return random_qkv(
        tokens, batch=case["batch"], heads=case["heads"], dtype=case["dtype"], device=device, seed=case["seed"]
    )


@given(case=cases())
@settings(max_examples=150)
def test_equals_the_reference(device, case):
    q, k, v = draw_qkv(case, device)
    out = t3_attention(q, k, v, case["grid"], case["partition"], prefix=case["prefix"])
    reference = t3_attention_reference(q, k, v, case["grid"], case["partition"], prefix=case["prefix"])
    assert out.dtype == q.dtype
    assert error(out, reference) < tolerance(q.dtype)


@given(case=cases(), fraction=st.floats(0.0, 1.0))
@settings(max_examples=100)
def test_a_memory_bound_changes_nothing(device, case, fraction):
    """Bit for bit where each window and head is computed alone; kernels may split their work by what they are given."""
    q, k, v = draw_qkv(case, device)
    where = (q, k, v, case["grid"], case["partition"])
    tokens = q.shape[1]
    least = case["batch"] * tokens * q.shape[-1] * q.element_size() * 5
    memory = int(least * (1 + fraction * case["heads"] * case["partition"].windows))
    whole, out = (t3_attention(*where, prefix=case["prefix"], memory=bound) for bound in (None, memory))
    assert error(out, whole.double()) < tolerance(q.dtype)
    alone = Backend("alone", "", one_window_and_head_at_a_time)
    whole, out = (t3_attention(*where, prefix=case["prefix"], memory=bound, backend=alone) for bound in (None, memory))
    assert torch.equal(out, whole)


def one_window_and_head_at_a_time(q, k, v, scale):
    out = torch.empty_like(q)
    for window in range(q.shape[0]):
        for head in range(q.shape[2]):
            one = (x[window : window + 1, :, head : head + 1] for x in (q, k, v))
            out[window : window + 1, :, head : head + 1] = BACKENDS["sdpa-math"].attend(*one, scale)
    return out


def test_a_memory_bound_limits_what_a_call_takes():
    taken = []

    def attend(q, k, v, scale):
        taken.append(sum(x.numel() * x.element_size() for x in (q, k, v)))
        return torch.zeros_like(q)

    q, k, v = random_qkv(4 * 6 * 10, heads=4)
    backend = Backend("counting", "", attend)
    t3_attention(q, k, v, (4, 6, 10), (2, 3, 5), backend=backend)
    assert len(taken) == 2
    taken.clear()
    t3_attention(q, k, v, (4, 6, 10), (2, 3, 5), backend=backend, memory=10_000)
    assert len(taken) > 2
    assert max(taken) <= 10_000 * 3 / 5
    with pytest.raises(T3Error, match="memory is 100 bytes.*need"):
        t3_attention(q, k, v, (4, 6, 10), (2, 3, 5), memory=100)


# Of grid (4, 6, 10) in (2, 3, 5) windows of 8 tokens, samples of one head: rows of 16 numbers, scores of both kinds.
LEAST = {
    "alone": (0, False, 5 * 8 * 16),
    "tokens beside": (4, False, max(3 * 8 + 2 * 12, 2 * 4) * 16),
    "scores": (0, True, 5 * 8 * 16 + 2 * 8 * 8),
    "scores of tokens beside": (4, True, max((3 * 8 + 2 * 12) * 16 + 2 * 8 * 12, 2 * 4 * 16 + 2 * 4 * 244)),
}


@pytest.mark.parametrize("case", LEAST)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_least_memory_is_that_of_one_window_and_head_of_all_samples(case, batch):
    beside, scores, numbers = LEAST[case]
    q, k, v = random_qkv(4 * 6 * 10 + beside, batch=batch, heads=3)
    backend = dataclasses.replace(BACKENDS["sdpa"], scores=scores)
    least = batch * 4 * numbers
    whole = t3_attention(q, k, v, (4, 6, 10), (2, 3, 5), prefix=beside, backend=backend)
    out = t3_attention(q, k, v, (4, 6, 10), (2, 3, 5), prefix=beside, backend=backend, memory=least)
    assert torch.allclose(out, whole, atol=1e-6)
    with pytest.raises(T3Error, match=f"memory is {least - 1:,} bytes.* need {least:,} for one head"):
        t3_attention(q, k, v, (4, 6, 10), (2, 3, 5), prefix=beside, backend=backend, memory=least - 1)


def test_one_window_keeps_to_its_memory_by_groups_of_heads():
    taken = []

    def attend(q, k, v, scale):
        taken.append(q.shape[2])
        return torch.zeros_like(q)

    q, k, v = random_qkv(60, heads=4)
    t3_attention(q, k, v, (3, 4, 5), (1, 1, 1), backend=Backend("counting", "", attend), memory=2 * 2 * 60 * 16 * 4)
    assert taken == [2, 2]


def test_launches_stay_legal_on_cards():
    """Kernels put batch x windows x heads on a launch dimension that ends at 65,535."""
    like = SimpleNamespace(shape=(2, 100_000, 12, 64), element_size=lambda: 2, device=torch.device("cuda"))
    groups = list(_groups(like, 50_000, 10, 2, 2, BACKENDS["sdpa"], None))
    assert max(2 * (w.stop - w.start) * (h.stop - h.start) for w, h in groups) <= 65_535
    assert sum((min(w.stop, 50_000) - w.start) * (h.stop - h.start) for w, h in groups) == 50_000 * 12


@pytest.mark.parametrize("which", [None, 0, 1, 2])
def test_a_backend_is_chosen_for_the_keys_and_gradients_there_are(monkeypatch, which):
    asked = []

    def noting(name, situation):
        asked.append(situation)
        return choose(name, situation)

    monkeypatch.setattr("t3.attention.choose", noting)
    qkv = random_qkv(3 + 3 * 5 * 7 + 2)
    if which is not None:
        qkv[which].requires_grad_()
    t3_attention(*qkv, (3, 5, 7), (1, 5, 2), prefix=3)
    with torch.no_grad():
        t3_attention(*qkv, (3, 5, 7), (1, 5, 2), prefix=3)
    assert [s.needs_grad for s in asked] == [which is not None, False]
    assert {s.windows for s in asked} == {(3 * 4 + 5, 3 * 3 + 5)}


def test_a_backend_that_would_be_wrong_for_these_windows_is_refused():
    picky = dataclasses.replace(BACKENDS["sdpa"], name="picky", keys_multiple=lambda: 64)
    q, k, v = random_qkv(105)
    with pytest.raises(T3Error, match="'picky', as installed, is wrong for 21 keys: it needs a multiple of 64"):
        t3_attention(q, k, v, (3, 5, 7), (1, 5, 1), backend=picky)


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
def test_windows_of_one_token_pass_their_value_on(device, dtype):
    q, k, v = random_qkv(2 * 3 * 5, batch=2, dtype=dtype, device=device)
    assert torch.equal(t3_attention(q, k, v, (2, 3, 5), (2, 3, 5)), v)


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("prefix", [0, 3])
def test_one_window_is_dense_attention(device, dtype, prefix):
    q, k, v = random_qkv(3 + 4 * 5 * 6, batch=2, dtype=dtype, device=device)
    out = t3_attention(q, k, v, (4, 5, 6), (1, 1, 1), prefix=prefix)
    assert error(out, dense_attention(q, k, v)) < tolerance(dtype)


@given(st.data())
@settings(max_examples=100)
def test_coinciding_branches_are_computed_once(data):
    grid = Grid(*(data.draw(st.integers(1, 6)) for _ in range(3)))
    partition = Partition(*(data.draw(st.integers(1, n)) for n in grid))
    pairs = []

    def attend(q, k, v, scale):
        pairs.append(q.shape[0] * q.shape[1] * k.shape[1])
        return BACKENDS["sdpa"].attend(q, k, v, scale)

    q, k, v = random_qkv(grid.tokens, heads=1)
    out = t3_attention(q, k, v, grid, partition, backend=Backend("counting", "", attend))
    local, strided = (windows(grid, partition, kind) for kind in (local_groups, strided_groups))
    same = {frozenset(w) for w in local} == {frozenset(w) for w in strided}
    branches = [local] if same else [local, strided]
    # A single key needs no backend.
    assert sum(pairs) == sum(len(w) ** 2 for branch in branches for w in branch if len(w) > 1)
    assert error(out, t3_attention_reference(q, k, v, grid, partition)) < tolerance(q.dtype)


def non_contiguous(x, how):
    if how == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "fused projection":
        return torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]
    return torch.stack([x, x], dim=1).flatten(0, 1)[::2]


@pytest.mark.parametrize("how", ["heads first", "fused projection", "every other sample"])
@pytest.mark.parametrize("partition", [(1, 1, 1), (3, 1, 1), (2, 3, 4)])
def test_non_contiguous_inputs(device, how, partition):
    q, k, v = random_qkv(3 * 5 * 7 + 2, batch=2, device=device)
    strange = [non_contiguous(x, how) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strange)
    out = t3_attention(*strange, (3, 5, 7), partition, prefix=1)
    assert error(out, t3_attention_reference(q, k, v, (3, 5, 7), partition, prefix=1)) < tolerance(q.dtype)


@pytest.mark.parametrize("memory", [None, 20_000])
def test_inputs_are_left_alone(device, memory):
    q, k, v = random_qkv(3 * 5 * 7, device=device)
    before = [x.clone() for x in (q, k, v)]
    t3_attention(q, k, v, (3, 5, 7), (2, 3, 2), memory=memory)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize(
    ("grid", "partition", "prefix", "suffix"),
    [
        ((2, 4, 6), (1, 2, 3), 0, 0),
        ((3, 4, 5), (2, 3, 2), 0, 0),
        ((2, 3, 4), (2, 1, 1), 0, 0),
        ((2, 3, 4), (1, 2, 2), 2, 1),
        ((2, 3, 4), (1, 1, 1), 1, 1),
    ],
)
def test_gradients_equal_the_reference_s(device, grid, partition, prefix, suffix):
    tokens = Grid(*grid).tokens + prefix + suffix
    leaves = [x.requires_grad_() for x in random_qkv(tokens, batch=2, dtype=torch.float64, device=device)]
    weight = torch.randn_like(leaves[0])
    for memory in (None, 30_000):
        out = t3_attention(*leaves, grid, partition, prefix=prefix, memory=memory)
        ours = torch.autograd.grad((out * weight).sum(), leaves)
        reference = t3_attention_reference(*leaves, grid, partition, prefix=prefix)
        truth = torch.autograd.grad((reference * weight).sum(), leaves)
        for a, b in zip(ours, truth, strict=True):
            assert error(a, b) < 1e-13


def test_gradcheck():
    leaves = [x.requires_grad_() for x in random_qkv(13, heads=1, head_dim=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: t3_attention(q, k, v, (2, 2, 3), (1, 2, 2), prefix=1), leaves)


def test_scale_is_used(device):
    q, k, v = random_qkv(4 * 4 * 4, device=device)
    out = t3_attention(q, k, v, (4, 4, 4), (2, 2, 2), scale=0.7)
    assert error(out, t3_attention_reference(q, k, v, (4, 4, 4), (2, 2, 2), scale=0.7)) < tolerance(q.dtype)
    assert error(out, t3_attention_reference(q, k, v, (4, 4, 4), (2, 2, 2))) > 1e-2
    none = t3_attention(q, k, v, (4, 4, 4), (2, 2, 2), scale=0.0)
    assert error(none, t3_attention_reference(q, k, v, (4, 4, 4), (2, 2, 2), scale=0.0)) < tolerance(q.dtype)


@pytest.mark.parametrize("name", ["wan2.1-4k", "wan2.2-4k"])
@pytest.mark.parametrize("kind", [LOCAL, STRIDED])
def test_released_index_maps(name, kind):
    """The released code's einops patterns, applied to the token numbers themselves, on the released grids."""
    einops = pytest.importorskip("einops")
    plan = Plan.preset(name)
    t, h, w = plan.grid
    numbers = torch.arange(plan.grid.tokens).view(t, h, w)
    pattern = {
        LOCAL: "(nt wt) (nh wh) (nw ww) -> (nt nh nw) (wt wh ww)",
        STRIDED: "(wt nt) (wh nh) (ww nw) -> (nt nh nw) (wt wh ww)",
    }[kind]
    for layer in range(5):
        partition = plan.partition(layer, plan.grid)
        (ours,) = window_indices(plan.grid, partition, kind, torch.device("cpu"))
        released = einops.rearrange(numbers, pattern, nt=partition.t, nh=partition.h, nw=partition.w)
        assert torch.equal(ours, released)


@given(st.data())
@settings(max_examples=100)
def test_windows_hold_every_token_once(data):
    grid = Grid(*(data.draw(st.integers(1, 9)) for _ in range(3)))
    partition = Partition(*(data.draw(st.integers(1, n)) for n in grid))
    for kind, groups in ((LOCAL, local_groups), (STRIDED, strided_groups)):
        classes = window_indices(grid, partition, kind, torch.device("cpu"))
        assert len(classes) <= 8
        assert torch.cat([c.flatten() for c in classes]).sort().values.tolist() == list(range(grid.tokens))
        found = {tuple(row) for c in classes for row in c.tolist()}
        assert found == {tuple(window) for window in windows(grid, partition, groups)}


def neighbourhood_mask(grid, size, dilation):
    """Neighbourhood attention written as a mask over coordinates: kernel `size`, stride `size`, `dilation`.

    With stride equal to the kernel all queries of a block share the block's neighbourhood. Dilation d splits an axis
    into d interleaved axes, each with blocks of its own (Hassani et al., "Neighborhood Attention", 2204.07143;
    "Generalized Neighborhood Attention", 2504.16922).
    """
    allowed = torch.ones(1, 1, dtype=torch.bool)
    for length, extent, step in zip(grid, size, dilation, strict=True):
        position = torch.arange(length)
        phase, place = position % step, position // step
        block = place // extent
        near = (phase[:, None] == phase[None]) & (block[:, None] == block[None])
        allowed = (allowed[:, None, :, None] & near[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return allowed


@pytest.mark.parametrize(
    ("grid", "partition"), [((3, 4, 6), (1, 2, 3)), ((4, 6, 6), (2, 3, 2)), ((6, 4, 5), (3, 2, 1))]
)
def test_windows_are_neighbourhood_and_dilated_attention(grid, partition):
    """Local windows are neighbourhood attention with kernel = stride = window; strided windows the same, dilated by
    the window count, so that the kernel spans the axis."""
    size = [n // c for n, c in zip(grid, partition, strict=True)]
    local = neighbourhood_mask(grid, size, (1, 1, 1))
    strided = neighbourhood_mask(grid, size, partition)
    q, k, v = random_qkv(Grid(*grid).tokens, batch=2, dtype=torch.float64)
    branches = [
        torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        ).transpose(1, 2)
        for mask in (local, strided)
    ]
    assert error(t3_attention(q, k, v, grid, partition), sum(branches) / 2) < 1e-14


def test_groupings_of_coinciding_layers():
    assert groupings((21, 136, 240), (21, 1, 1)) == (LOCAL,)
    assert groupings((21, 136, 240), (1, 17, 30)) == (LOCAL, STRIDED)


def test_same_result_alone_and_in_a_batch(device):
    q, k, v = random_qkv(3 * 5 * 7, batch=2, device=device)
    both = t3_attention(q, k, v, (3, 5, 7), (2, 3, 2))
    for i in range(2):
        alone = t3_attention(*(x[i : i + 1] for x in (q, k, v)), (3, 5, 7), (2, 3, 2))
        assert error(both[i : i + 1], alone.double()) < tolerance(q.dtype)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    q, k, v = random_qkv(3 * 5 * 7 + 2, batch=2)

    def run(q, k, v):
        return t3_attention(q * 2, k, v, Grid(3, 5, 7), Partition(2, 3, 2), prefix=1, backend="sdpa")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert error(compiled(q, k, v), run(q, k, v).double()) < tolerance(q.dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grid": (3, 5, 8)}, "do not fit 105 tokens"),
        ({"prefix": 1}, "do not fit 105 tokens"),
        ({"prefix": -1}, "prefix of -1"),
        ({"partition": (4, 1, 1)}, "4 windows along t.*Nearest: 3"),
        ({"partition": (0, 1, 1)}, "0 windows along t.*Nearest: 1"),
        ({"backend": "fastest"}, "unknown attention backend 'fastest'.*sdpa-cudnn"),
        ({"k": torch.zeros(1, 104, 2, 16)}, "expected three equal"),
        ({"v": torch.zeros(1, 105, 2, 8)}, "expected three equal"),
        ({"k": torch.zeros(1, 105, 2, 16, dtype=torch.float64)}, "one float dtype"),
        ({"v": torch.zeros(1, 105, 2, 16, dtype=torch.float64)}, "one float dtype"),
    ],
)
def test_bad_arguments_are_named(change, words):
    q, k, v = random_qkv(105)
    arguments = {"q": q, "k": k, "v": v, "grid": (3, 5, 7), "partition": (1, 2, 2), **change}
    with pytest.raises(T3Error, match=words):
        t3_attention(**arguments)


def test_a_failing_backend_is_an_error_not_a_fallback():
    def attend(q, k, v, scale):
        raise RuntimeError("kernel went wrong")

    q, k, v = random_qkv(105)
    broken = dataclasses.replace(BACKENDS["sdpa"], attend=attend)
    with pytest.raises(RuntimeError, match="kernel went wrong"):
        t3_attention(q, k, v, (3, 5, 7), (1, 2, 2), backend=broken)


def test_what_was_sampled_with_can_be_trained_through():
    """Hosts sample in inference mode; the windows' indices are kept from then on."""
    grid, partition = (3, 7, 10), (1, 2, 3)
    q, k, v = random_qkv(3 * 7 * 10)
    with torch.inference_mode():
        expected = t3_attention(q, k, v, grid, partition)
    trained = q.clone().requires_grad_()
    out = t3_attention(trained, k, v, grid, partition)
    out.sum().backward()
    assert torch.equal(out.detach(), expected) and trained.grad.isfinite().all()
