"""Training attention against a masked dense reference in float64: values, gradients, and the way to the plan's own."""

from itertools import pairwise

import pytest
import torch

from t3 import Grid, Partition, Plan, t3_attention
from t3.retrofit.attention import training_attention
from t3.retrofit.config import Stage
from t3.retrofit.logsumexp import window_logsumexp
from t3.retrofit.operator import Operator, grown, with_dense_layers
from t3.retrofit.progress import Clock, Progress, fraction, learning_rate, merge, ways, windows

# Even and uneven cuts, one window, windows of one token, groupings that coincide.
CASES = [
    ((2, 5, 7), (1, 2, 3)),
    ((3, 4, 6), (3, 2, 2)),
    ((2, 3, 4), (2, 3, 4)),
    ((2, 3, 4), (1, 1, 1)),
    ((2, 4, 4), (2, 1, 1)),
]

NOW = {"seconds": 0.0, "training": 0.0, "lost": 0.0}


def labels(grid, counts, kind):
    """The window of every token, written out by its definition."""
    found = []
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                place = []
                for x, length, n in zip((t, h, w), grid, counts, strict=True):
                    longer = length % n
                    short = length // n
                    if kind == "strided":
                        place.append(x % n)
                    else:
                        cut = longer * (short + 1)
                        place.append(x // (short + 1) if x < cut else longer + (x - cut) // short)
                found.append(tuple(place))
    return found


def masks(grid, counts):
    for kind in ("local", "strided"):
        own = labels(grid, counts, kind)
        yield torch.tensor([[a == b for b in own] for a in own])


def reference(q, k, v, grid, counts, branches="both", mean=1.0):
    """Dense attention under masks; merged by `mean` times the mean and the rest by log-sum-exp."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    outs, sums = [], []
    for mask in masks(grid, counts):
        masked = scores.masked_fill(~mask, float("-inf"))
        outs.append(torch.einsum("bhqk,bkhd->bqhd", masked.softmax(-1), v))
        sums.append(masked.logsumexp(-1).transpose(1, 2)[..., None])
    if branches != "both":
        return outs[("local", "strided").index(branches)]
    share = torch.softmax(torch.stack(sums), dim=0)
    return mean * (outs[0] + outs[1]) / 2 + (1 - mean) * (share[0] * outs[0] + share[1] * outs[1])


def qkv(grid, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    count = grid[0] * grid[1] * grid[2]
    # A transposed layout, so that nothing relies on contiguous heads.
    return [torch.randn(2, 3, count, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def with_gradients(function, inputs, weights):
    out = function(*inputs)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize(("grid", "counts"), CASES)
@pytest.mark.parametrize(
    ("branches", "mean"), [("both", 1.0), ("local", 1.0), ("strided", 1.0), ("both", 0.3), ("both", 0.0)]
)
def test_values_and_gradients_equal_the_masked_dense_reference(grid, counts, branches, mean):
    inputs = qkv(grid)
    weights = torch.randn(inputs[0].shape, dtype=torch.float64)
    weight = None if mean == 1.0 else torch.tensor(mean, dtype=torch.float64)
    found = with_gradients(
        lambda q, k, v: training_attention(q, k, v, grid, counts, branches=branches, mean=weight), inputs, weights
    )
    expected = with_gradients(lambda q, k, v: reference(q, k, v, grid, counts, branches, mean), inputs, weights)
    # The merge by log-sum-exp interpolates in float32.
    tolerance = 1e-11 if weight is None else 1e-5
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize(("grid", "counts"), CASES)
@pytest.mark.parametrize("mean", [1.0, 0.3])
def test_values_and_gradients_on_a_card_in_bfloat16(grid, counts, mean):
    torch.manual_seed(0)
    count = grid[0] * grid[1] * grid[2]
    exact = [torch.randn(2, count, 3, 128, dtype=torch.float64).bfloat16().double().requires_grad_() for _ in range(3)]
    half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    weights = torch.randn(exact[0].shape).bfloat16()
    weight = None if mean == 1.0 else torch.tensor(mean, device="cuda")
    found = with_gradients(
        lambda q, k, v: training_attention(q, k, v, grid, counts, mean=weight), half, weights.to("cuda")
    )
    expected = with_gradients(lambda q, k, v: reference(q, k, v, grid, counts, mean=mean), exact, weights.double())
    for a, b in zip(found, expected, strict=True):
        # bfloat16 rounds by 2^-9 at each of a handful of places.
        assert (a.cpu().double() - b).norm() <= 0.02 * b.norm() + 1e-6


def test_it_is_the_operation_of_the_rest_of_the_package():
    inputs = qkv((2, 5, 7), dtype=torch.float32)
    ours = training_attention(*inputs, (2, 5, 7), (1, 2, 3))
    torch.testing.assert_close(ours, t3_attention(*inputs, (2, 5, 7), (1, 2, 3)), atol=1e-6, rtol=1e-5)


def test_log_sum_exp_in_pieces_has_the_gradient_of_the_whole(monkeypatch):
    monkeypatch.setattr("t3.retrofit.logsumexp._SCORES", 2 * 5 * 5 * 2)
    torch.manual_seed(1)
    q, k = (torch.randn(5, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: window_logsumexp(q, k, 0.5), (q, k))
    expected = torch.einsum("wqhd,wkhd->wqhk", q, k).mul(0.5).logsumexp(-1)
    torch.testing.assert_close(window_logsumexp(q, k, 0.5), expected)


def test_counts_grow_from_one_to_the_plans_own():
    plan, grid = Plan.preset("wan2.1-4k"), Grid(21, 136, 240)
    for layer in range(5):
        target = plan.partition(layer, grid)
        assert grown(target, 0.0) == (1, 1, 1)
        assert grown(target, 1.0) == target
        steps = [grown(target, i / 8) for i in range(9)]
        assert all(a <= b for one, other in pairwise(steps) for a, b in zip(one, other, strict=True))
        for counts in steps:
            counts.check(grid)


def test_curricula_end_at_the_plans_own_operator():
    stage = Stage(steps=10, windows_from_dense=0.5, window_levels=4, merge_from_lse=0.4)
    at = [fraction(stage, step, NOW, 0.0) for step in range(1, 11)]
    assert [windows(stage, f) for f in at] == [0.0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert [merge(stage, f) for f in at] == [0.25, 0.5, pytest.approx(0.75), None, None, None, None, None, None, None]
    assert {windows(stage, done) for done in ways(stage)} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {merge(stage, done) is None for done in ways(stage)} == {True, False}
    plain = Stage(steps=10)
    assert windows(plain, 0.0) == 1.0 and ways(plain) == [1.0]
    assert merge(plain, 0.0) is None


def test_at_weight_one_the_merge_is_the_mean():
    inputs = qkv((2, 4, 6), dtype=torch.float32)
    annealed = training_attention(*inputs, (2, 4, 6), (1, 2, 2), mean=torch.ones(()))
    torch.testing.assert_close(annealed, training_attention(*inputs, (2, 4, 6), (1, 2, 2)), atol=1e-6, rtol=1e-6)


def test_dense_layers_are_a_plan_of_their_own():
    plan = Plan("p", Grid(2, 4, 4), ((1, 2, 2), (2, 1, 1)))
    kept = with_dense_layers(plan, (0, 3), 5)
    assert [kept.partition(i, (2, 4, 4)) for i in range(5)] == [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 1, 1), (1, 2, 2)]
    assert Plan.from_json(kept.to_json()) == kept
    with pytest.raises(ValueError, match="layers 0 to 4. Nearest: 4"):
        with_dense_layers(plan, (5,), 5)
    operator = Operator(plan, dense=True)
    assert operator.partition(0, Grid(2, 4, 4)) == Partition(1, 1, 1)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_then_follows_its_decay(decay):
    stage = Stage(steps=100, lr=2.0, warmup=0.1, decay=decay, final_lr=0.25)
    rates = [learning_rate(stage, done / 100) for done in range(101)]
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(2.0 if decay == "constant" else 0.5)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_time_ends_a_stage_with_room_for_what_comes_after():
    def done(stage, steps, seconds, lost, aside, reserve):
        return fraction(stage, steps, {"seconds": seconds, "lost": lost, "training": seconds - lost - aside}, reserve)

    stage = Stage(max_seconds=100.0)
    assert done(stage, 7, 45.0, 0.0, 5.0, 10.0) == pytest.approx(0.5)
    assert done(stage, 7, 90.0, 0.0, 0.0, 10.0) == 1.0
    assert done(stage, 7, 1.0, 0.0, 0.0, 200.0) == 1.0
    # A slow start takes nothing from the rise of the learning rate.
    assert done(stage, 0, 30.0, 30.0, 0.0, 10.0) == 0.0
    assert done(stage, 7, 60.0, 30.0, 0.0, 10.0) == pytest.approx(0.5)
    assert done(Stage(steps=10, max_seconds=100.0), 8, 10.0, 0.0, 0.0, 0.0) == pytest.approx(0.8)
    assert done(Stage(training_seconds=100.0), 8, 90.0, 20.0, 10.0, 50.0) == pytest.approx(0.6)


def test_a_clock_tells_steps_from_the_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("t3.retrofit.progress.time.monotonic", lambda: now[0])
    at = Progress(Clock(100.0))
    now[0] = 110.0
    at.clock.begin()
    now[0] = 130.0
    at.clock.aside += 5.0
    assert at.all_seconds() == {"seconds": 30.0, "training": 15.0}
    saved = at.clock.state()
    now[0] = 1000.0
    at.clock = Clock(1000.0, **saved)
    now[0] = 1002.0
    at.clock.begin()
    now[0] = 1003.0
    assert at.all_seconds() == {"seconds": 33.0, "training": 16.0}
    at.next_stage()
    now[0] = 1004.0
    assert at.all_seconds() == {"seconds": 34.0, "training": 17.0}
    assert (at.stage, at.clock.seconds()) == (1, 1.0)
