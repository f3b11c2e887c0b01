"""The sums of `t3.weights.arithmetic` written out element by element, for the forms that few files have."""

import itertools

import numpy as np
import pytest
import torch
from weights_fixtures import one_thread  # noqa: F401

from t3.weights.arithmetic import changed, delta, missing_roles, rank_of, result_shape

KERNEL = (1, 2, 2)
OUT, IN, RANK = 6, 4, 3


def draw(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {role: torch.randn(shape, generator=generator, dtype=torch.float64) for role, shape in shapes.items()}


def cored(a, b, core):
    """`[out, in, *kernel]`: the sum over both ranks, one element at a time."""
    out = np.zeros((a.shape[0], b.shape[1], *core.shape[2:]))
    for o, c in itertools.product(range(a.shape[0]), range(b.shape[1])):
        for i, j in itertools.product(range(core.shape[0]), range(core.shape[1])):
            out[o, c] += a[o, i] * core[i, j] * b[j, c]
    return out


BASE = draw(1, base=(OUT, IN, *KERNEL))["base"]


def test_lora_with_a_core():
    parts = draw(2, up=(OUT, RANK), down=(RANK, IN), mid=(RANK, RANK, *KERNEL))
    want = 0.7 * cored(*(parts[role].numpy() for role in ("up", "down", "mid")))
    np.testing.assert_allclose(delta("lora", parts, BASE, scale=0.7), want, rtol=1e-12)
    assert result_shape("lora", {role: tuple(t.shape) for role, t in parts.items()}) == (OUT, IN * 4)


def test_loha_with_cores():
    parts = draw(3, w1_a=(RANK, OUT), w1_b=(RANK, IN), w2_a=(RANK, OUT), w2_b=(RANK, IN))
    parts |= draw(4, t1=(RANK, RANK, *KERNEL), t2=(RANK, RANK, *KERNEL))
    first, second = (
        cored(parts[f"{w}_a"].numpy().T, parts[f"{w}_b"].numpy(), parts[t].numpy())
        for w, t in (("w1", "t1"), ("w2", "t2"))
    )
    np.testing.assert_allclose(delta("loha", parts, BASE, scale=0.7), 0.7 * first * second, rtol=1e-12)
    assert result_shape("loha", {role: tuple(t.shape) for role, t in parts.items()}) == (OUT, IN * 4)


def test_lokr_with_a_core():
    parts = draw(5, w1=(2, 2), w2_a=(RANK, OUT // 2), w2_b=(RANK, IN // 2), t2=(RANK, RANK, *KERNEL))
    second = cored(parts["w2_a"].numpy().T, parts["w2_b"].numpy(), parts["t2"].numpy())
    want = np.zeros(BASE.shape)
    for o, c in itertools.product(range(OUT), range(IN)):
        want[o, c] = parts["w1"][o // 3, c // 2].item() * second[o % 3, c % 2]
    np.testing.assert_allclose(delta("lokr", parts, BASE), want, rtol=1e-12)
    assert result_shape("lokr", {role: tuple(t.shape) for role, t in parts.items()}) == (OUT, IN * 4)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_by_rows_and_by_columns(axis):
    parts = draw(6, up=(OUT, RANK), down=(RANK, IN), magnitude=(OUT, 1) if axis == 0 else (1, IN))
    base = draw(7, base=(OUT, IN))["base"]
    merged = base.numpy() + 2 * parts["up"].numpy() @ parts["down"].numpy()
    lengths = np.sqrt((merged**2).sum(1 - axis, keepdims=True))
    want = parts["magnitude"].numpy() * merged / lengths
    np.testing.assert_allclose(changed("lora", parts, base, scale=2.0), want, rtol=1e-12)
    half = changed("lora", parts, base, scale=2.0, strength=-0.5)
    np.testing.assert_allclose(half, base.numpy() - 0.5 * (want - base.numpy()), rtol=1e-12)


def test_replaced_weights_are_exact_and_the_base_stays():
    base, new = draw(8, base=(3, 3))["base"].float(), draw(9, new=(3, 3))["new"].float()
    before = base.clone()
    assert torch.equal(changed("set", {"set": new}, base), new) and torch.equal(base, before)
    torch.testing.assert_close(changed("set", {"set": new}, base, strength=0.25), base + 0.25 * (new - base))


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("lora", {"up": (6, 3), "down": (2, 4)}),
        ("lora", {"up": (6,), "down": (1, 4)}),
        ("lora", {"up": (6, 3), "down": (3, 4), "mid": (2, 3, 1, 1)}),
        ("lora", {"up": (6, 3), "down": (3, 4), "mid": (3, 2, 1, 1)}),
        ("lora", {"up": (6, 3), "down": (3, 4, 2, 2), "mid": (3, 3, 1, 1)}),
        ("loha", {"w1_a": (6, 3), "w1_b": (3, 4), "w2_a": (6, 2), "w2_b": (3, 4)}),
        ("loha", {"w1_a": (6, 3), "w1_b": (3, 4), "w2_a": (6, 3), "w2_b": (3, 5)}),
        ("lokr", {"w1": (2, 2), "w2_a": (3, 3), "w2_b": (2, 2)}),
        ("lokr", {"w1": (2,), "w2": (3, 2)}),
    ],
)
def test_parts_that_do_not_fit_together(kind, shapes):
    assert result_shape(kind, shapes) is None


def test_parts_that_are_missing():
    assert missing_roles("lora", {"up"}) == "A (down)" and missing_roles("lora", {"up", "down"}) is None
    assert missing_roles("loha", {"w1_a", "w1_b", "w2_a", "w2_b"}) is None
    assert missing_roles("loha", {"w1_a", "w1_b", "w2_a", "w2_b", "t1"}) == "t2"
    assert missing_roles("lokr", {"w1", "w2_a"}) == "w2_b" and missing_roles("lokr", {"w1", "w2"}) is None
    # As LyCORIS and ComfyUI: the second factor's rank goes first, and two whole factors have none.
    assert rank_of("lokr", {"w1_a": (2, 5), "w1_b": (5, 2), "w2_a": (3, 7), "w2_b": (7, 2)}) == 7
    assert rank_of("lokr", {"w1": (2, 2), "w2": (3, 2)}) == 0
