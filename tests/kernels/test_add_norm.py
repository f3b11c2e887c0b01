"""`add_norm` and `add_` by Triton against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from t3.errors import T3Error
from t3.kernels.add_norm import naive
from t3.kernels.add_norm.op import add_, add_norm

# Unit roundoff; Triton's interpreter cuts bfloat16 off instead of rounding it, which is twice that.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDOFF)
EPS = 1e-6


@pytest.fixture(scope="session")
def kernel(device):
    from t3.kernels.add_norm import kernel

    return kernel


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(out, truth, dtype):
    assert out.dtype == dtype and out.shape == truth.shape
    assert torch.isfinite(out).all()
    off = (out.double() - truth).abs()
    assert (off <= 2 * ROUNDOFF[dtype] * truth.abs() + 1e-6 * truth.abs().max()).all()


def added(x, update, gate):
    """The new x in float64."""
    new = x.double()
    naive.add_(new, update.double(), gate)
    return new


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [256, 1536, 3072, 5120, 20])
@pytest.mark.parametrize("each", [False, True])
def test_all_at_once_equals_the_truth(device, kernel, dtype, width, each):
    """Batch 2, a number of tokens that no program's divides, modulation in float32 as diffusers has it."""
    rows = 7 if each else 1
    x, update = random(2, 7, width, dtype=dtype, device=device), random(2, 7, width, dtype=dtype, device=device, seed=1)
    gate, scale, shift = (random(2, rows, width, device=device, seed=s) for s in (2, 3, 4))
    expected = added(x, update, gate)
    y = kernel.norm(x, EPS, scale, shift, True, update, gate)
    close(x, expected, dtype)
    close(y, naive.norm(x.double(), EPS, scale, shift, True), dtype)


@pytest.mark.parametrize("change", ["none", "plain", "gated"])
@pytest.mark.parametrize("after", ["nothing", "affine", "modulation", "weight", "shift"])
def test_every_part_may_be_missing(device, kernel, change, after):
    dtype = torch.bfloat16
    x, update = random(2, 5, 96, dtype=dtype, device=device), random(2, 5, 96, dtype=dtype, device=device, seed=1)
    gate = random(1, 1, 96, dtype=dtype, device=device, seed=2) if change == "gated" else None
    multiply = random(96, dtype=dtype, device=device, seed=3) if after in ("affine", "modulation", "weight") else None
    plus = random(2, 1, 96, device=device, seed=4) if after in ("affine", "modulation", "shift") else None
    before, one = x.clone(), after == "modulation"
    if change == "none":
        y = kernel.norm(x, EPS, multiply, plus, one)
        assert torch.equal(x, before)
    else:
        y = kernel.norm(x, EPS, multiply, plus, one, update, gate)
        close(x, added(before, update, gate), dtype)
        alone = before.clone()
        kernel.add_(alone, update, gate)
        assert torch.equal(alone, x)
        # In two passes it is the same, bit for bit.
        assert torch.equal(kernel.norm(alone, EPS, multiply, plus, one), y)
    close(y, naive.norm(x.double(), EPS, multiply, plus, one), dtype)


@pytest.mark.parametrize("of_x", ["chunk", "every other token"])
@pytest.mark.parametrize("of_update", ["chunk", "channels apart", "one for both samples"])
@pytest.mark.parametrize("of_gate", ["chunk of six", "channels apart", "per token of six"])
def test_any_strides_and_nothing_beside_is_touched(device, kernel, of_x, of_update, of_gate):
    whole = random(2, 16, 48, device=device)
    before = whole.clone()
    at = slice(3, 10) if of_x == "chunk" else slice(1, 15, 2)
    x = whole[:, at]
    update = {
        "chunk": random(2, 9, 48, device=device, seed=1)[:, 1:8],
        "channels apart": random(2, 48, 7, device=device, seed=1).transpose(1, 2),
        "one for both samples": random(1, 7, 48, device=device, seed=1).expand(2, 7, 48),
    }[of_update]
    gate, scale, shift = {
        "chunk of six": random(2, 6, 48, device=device, seed=2).chunk(6, dim=1)[:3],
        "channels apart": [random(2, 48, 1, device=device, seed=s).transpose(1, 2) for s in (2, 3, 4)],
        "per token of six": random(2, 7, 6, 48, device=device, seed=2).unbind(2)[:3],
    }[of_gate]
    expected = added(x, update, gate)
    y = kernel.norm(x, EPS, scale, shift, True, update, gate)
    close(x, expected, torch.float32)
    close(y, naive.norm(x.double(), EPS, scale, shift, True), torch.float32)
    whole[:, at] = before[:, at]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("of_x", ["chunk", "of its own"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_sum_put_elsewhere_is_that_of_a_copy_bit_for_bit(device, kernel, of_x, gated):
    """x is only read; `into` is a chunk of a larger tensor, beside which nothing is touched."""
    dtype = torch.bfloat16
    x = random(2, 16, 48, dtype=dtype, device=device)[:, 2:9] if of_x == "chunk" else random(2, 7, 48, device=device)
    update, whole = random(2, 7, 48, device=device, seed=1).to(x.dtype), random(2, 16, 48, device=device, seed=2)
    gate = random(2, 1, 48, device=device, seed=3) if gated else None
    scale, shift = random(2, 1, 48, device=device, seed=4), random(2, 1, 48, device=device, seed=5)
    whole = whole.to(x.dtype)
    before, beside, copy = x.clone(), whole.clone(), x.clone()
    expected = kernel.norm(copy, EPS, scale, shift, True, update, gate)
    for at in (slice(5, 12), slice(1, 15, 2)):
        assert torch.equal(kernel.norm(x, EPS, scale, shift, True, update, gate, whole[:, at]), expected)
        assert torch.equal(whole[:, at], copy)
        whole[:, at] = torch.nan
        kernel.add_(x, update, gate, whole[:, at])
        assert torch.equal(whole[:, at], copy)
        whole[:, at] = beside[:, at]
        assert torch.equal(whole, beside) and torch.equal(x, before)


@pytest.mark.parametrize("warps", [1, 4])
def test_how_many_warps_changes_no_row(device, kernel, warps):
    x, update = random(2, 10, 160, device=device), random(2, 10, 160, device=device, seed=1)
    gate, scale = random(2, 1, 160, device=device, seed=2), random(2, 10, 160, device=device, seed=3)
    expected = added(x, update, gate)
    y = kernel.norm(x, EPS, scale, None, True, update, gate, warps=warps)
    close(x, expected, torch.float32)
    close(y, naive.norm(x.double(), EPS, scale, None, True), torch.float32)


def test_every_element_is_written_and_a_second_run_is_bit_equal(device, kernel, monkeypatch):
    """The result's memory holds NaN before the kernel runs."""
    x = random(2, 33, 384, dtype=torch.bfloat16, device=device)
    update = random(2, 33, 384, dtype=torch.bfloat16, device=device, seed=1)
    gate = random(2, 1, 384, device=device, seed=2)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size, **kw: new_empty(t, *size, **kw).fill_(torch.nan))
    results = []
    for _ in range(2):
        here = x.clone()
        results.append((kernel.norm(here, EPS, gate, gate, True, update, gate), here))
    for first, second in zip(*results, strict=True):
        assert torch.isfinite(first).all() and torch.equal(first, second)


def test_extreme_values(device, kernel):
    """A constant row has no variance: its norm is what is added. Large values neither overflow nor lose the mean."""
    x = random(1, 4, 256, device=device)
    x[0, 0], x[0, 1], x[0, 2] = 3.0, x[0, 1] * 1e17, x[0, 2] + 1000
    plus = random(256, device=device, seed=1)
    y = kernel.norm(x, EPS, None, plus, False)
    assert torch.equal(y[0, 0], plus)
    truth = naive.norm(x.double(), EPS, None, plus, False)
    close(y[:, [0, 1, 3]], truth[:, [0, 1, 3]], torch.float32)
    # 1000 +- 1 in float32 has 13 bits left below the mean.
    assert (y[0, 2].double() - truth[0, 2]).abs().max() < 1000 * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_what_hosts_compute(device, kernel, dtype):
    """ComfyUI's expressions, modulation in x's dtype: our error to float64 is at most twice theirs, by norm.

    In the interpreter, which cuts bfloat16 off where torch rounds, as much more as that is.
    """
    x, update = random(2, 50, 1536, dtype=dtype, device=device), random(2, 50, 1536, dtype=dtype, device=device, seed=1)
    gate, scale, shift = (random(2, 1, 1536, dtype=dtype, device=device, seed=s) for s in (2, 3, 4))
    truth = added(x, update, gate)
    exact = naive.norm(truth, EPS, scale, shift, True)
    theirs = torch.addcmul(x, update, gate)
    normed = torch.nn.functional.layer_norm(theirs, (1536,), eps=EPS)
    their_y = torch.addcmul(shift, normed, 1 + scale)
    ours = x.clone()
    y = kernel.norm(ours, EPS, scale, shift, True, update, gate)

    def error(out, right):
        return ((out.double() - right).norm() / right.norm()).item()

    cut_off = 2 if device == "cpu" and dtype == torch.bfloat16 else 1
    assert error(ours, truth) <= 2 * cut_off * error(theirs, truth)
    assert error(y, exact) <= 2 * cut_off * error(their_y, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operators_compute_what_hosts_do(dtype):
    """On the CPU, in plain torch: diffusers' block and ComfyUI's, to rounding."""
    x, update = random(2, 6, 64, dtype=dtype), random(2, 6, 64, dtype=dtype, seed=1)
    gate, scale, shift = (random(2, 1, 64, seed=s) for s in (2, 3, 4))
    weight, bias = random(64, seed=5).to(dtype), random(64, seed=6).to(dtype)
    bound = 4 * ROUNDOFF.get(dtype, 2.0**-24)

    def equal(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=4 * bound)

    new = (x.float() + update * gate).type_as(x)
    normed = torch.nn.functional.layer_norm(new.float(), (64,), eps=EPS)
    ours = x.clone()
    equal(add_norm(ours, update, gate, scale=scale, shift=shift), (normed * (1 + scale) + shift).type_as(x))
    equal(ours, new)
    before = ours.clone()
    equal(add_norm(ours, weight=weight, bias=bias), torch.nn.functional.layer_norm(new, (64,), weight, bias, EPS))
    equal(add_norm(ours), normed.type_as(x))
    assert torch.equal(ours, before)
    add_(ours, update)
    equal(ours, before + update)


def test_the_operators_are_whole_for_torch():
    x, update, gate = random(2, 6, 64), random(2, 6, 64, seed=1), random(2, 1, 64, seed=2)
    from t3.kernels.add_norm import op

    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._norm, (x, EPS, gate, None, True), test_utils=tests)
    torch.library.opcheck(op._add_norm, (x.clone(), update, gate, EPS, None, gate, False), test_utils=tests)
    torch.library.opcheck(op._add, (x.clone(), update, None), test_utils=tests)
    into = torch.zeros_like(x)
    torch.library.opcheck(op._add_norm_into, (x, into, update, gate, EPS, None, gate, False), test_utils=tests)
    torch.library.opcheck(op._add_into, (x, into, update, gate), test_utils=tests)


def test_the_operators_put_a_sum_elsewhere():
    x, update, gate, into = random(2, 6, 64), random(2, 6, 64, seed=1), random(2, 1, 64, seed=2), random(2, 9, 64)
    copy, before = x.clone(), x.clone()
    expected = add_norm(copy, update, gate, scale=gate)
    assert torch.equal(add_norm(x, update, gate, scale=gate, into=into[:, 2:8]), expected)
    assert torch.equal(into[:, 2:8], copy) and torch.equal(x, before)
    into.zero_()
    add_(x, update, gate, into=into[:, 2:8])
    assert torch.equal(into[:, 2:8], copy) and torch.equal(x, before) and not into[:, :2].any()


def test_compiled_code_changes_the_same_rows():
    def block(whole, update, gate):
        chunk = whole[:, 2:5]
        y = add_norm(chunk, update, gate, scale=gate)
        add_(chunk, y)
        return y + chunk

    whole, update, gate = random(2, 6, 64), random(2, 3, 64, seed=1), random(2, 1, 64, seed=2)
    twin = whole.clone()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(whole, update, gate), block(twin, update, gate))
    assert torch.equal(whole, twin) and not torch.equal(whole, random(2, 6, 64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": 64}, "a gate was given without an update"),
        ({"scale": 64, "weight": 64}, "not both"),
        ({"scale": 32}, r"scale has shape \(1, 1, 32\).*broadcast to \(2, 6, 64\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(T3Error, match=words):
        add_norm(random(2, 6, 64), **{name: random(1, 1, width) for name, width in change.items()})


def test_shapes_dtypes_and_strides_are_checked_before_anything_is_written():
    x = random(2, 6, 64)
    with pytest.raises(T3Error, match=r"update is \(2, 5, 64\).*expected \(2, 6, 64\)"):
        add_(x, random(2, 5, 64))
    with pytest.raises(T3Error, match="update is .*float16; expected .*float32"):
        add_(x, random(2, 6, 64).half())
    with pytest.raises(T3Error, match="gate has dtype torch.float16"):
        add_(x, random(2, 6, 64), random(1, 1, 64).half())
    with pytest.raises(T3Error, match="must lie side by side"):
        add_norm(x.transpose(1, 2))
    with pytest.raises(T3Error, match=r"expected \[B, n, dim\]"):
        add_norm(x[0])
    for into in (random(2, 5, 64), x.clone().half(), random(2, 64, 6).transpose(1, 2)):
        with pytest.raises(T3Error, match="into is .* with strides .*as x has, channels side by side"):
            add_(x, x.clone(), into=into)
    with pytest.raises(T3Error, match="into was given without an update"):
        add_norm(x, into=x.clone())
    for tensors in ((x, x.clone().requires_grad_()), (x, x.clone(), random(1, 1, 64).requires_grad_())):
        with pytest.raises(T3Error, match="has no gradients"):
            add_(*tensors)
        with torch.no_grad():
            add_(tensors[0].clone(), *tensors[1:])
    assert torch.equal(x, random(2, 6, 64))
