"""`conv_sum` in Triton against plain torch, and plain torch against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from t3.kernels.conv_sum import naive
from t3.kernels.conv_sum.naive import Doubled

LAST = torch.channels_last
# One rounding to the dtype may fall to the other side, and what was rounded differs in float32's last bits. Triton's
# interpreter rounds to bfloat16 towards zero: a whole unit in the last place.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
CASES = [None, Doubled(0, 0), Doubled(1, 0, times=2, frame=1), Doubled(1, 1), Doubled(0, 1, times=2, frame=0)]


def picture(generator, *shape, dtype, device):
    """Random, with the channels last, in a larger tensor whose rest is not a number."""
    batch, channels, height, width = shape
    room = torch.full((batch, channels, height + 2, width + 3), torch.nan, dtype=dtype).contiguous(memory_format=LAST)
    room[:, :, 1:-1, 2:-1] = torch.randn(shape, generator=generator).to(dtype)
    return room.to(device)[:, :, 1:-1, 2:-1]


def terms(doubled, channels, height, width, dtype, device, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if doubled is None:
        y = picture(generator, batch, channels, height, width, dtype=dtype, device=device)
        by = picture(generator, batch, channels, height, width, dtype=dtype, device=device)
    else:
        half = (height + doubled.row + 1) // 2, (width + doubled.col + 1) // 2
        y = picture(generator, batch, 4 * channels, half[0] + 1, half[1] + 1, dtype=dtype, device=device)
        into = channels * doubled.times * 4 // 2
        by = picture(generator, batch, into, *half, dtype=dtype, device=device)
    bias, gamma = (torch.randn(channels, generator=generator).to(dtype).to(device) for _ in range(2))
    return y, bias, by, gamma


def places(channels, height, width, dtype, device, batch=2):
    """Where to write: a picture, and a third of the channels of another, both not numbers."""
    total = torch.full((batch, channels, height, width), torch.nan, dtype=dtype, device=device)
    slab = torch.full((batch, 3 * channels, height, width), torch.nan, dtype=dtype, device=device)
    return total.contiguous(memory_format=LAST), slab.contiguous(memory_format=LAST)


def by_loops(y, bias, by, doubled, gamma, shape):
    """The definition, number by number, in float64: the sum, and its norm before SiLU."""
    batch, channels, height, width = shape
    total = torch.empty(shape, dtype=torch.float64)
    y, bias, by = y.double().cpu(), bias.double().cpu(), by.double().cpu()
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    if doubled is None:
                        total[b, c, i, j] = y[b, c, i, j] + bias[c] + by[b, c, i, j]
                        continue
                    (row, p), (col, q) = divmod(i + doubled.row, 2), divmod(j + doubled.col, 2)
                    place = ((c * doubled.times + doubled.frame) * 2 + p) * 2 + q
                    dealt = place // (channels * doubled.times * 4 // by.shape[1])
                    total[b, c, i, j] = (
                        y[b, (2 * p + q) * channels + c, row + p, col + q] + bias[c] + by[b, dealt, row, col]
                    )
    length = total.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    return total, total / length * math.sqrt(channels) * gamma.double().cpu()[:, None, None]


@pytest.mark.parametrize("doubled", CASES)
def test_plain_torch_is_the_definition(doubled):
    shape = (2, 6, 5, 4)
    y, bias, by, gamma = terms(doubled, *shape[1:], torch.float64, "cpu")
    total, slab = places(*shape[1:], torch.float64, "cpu")
    wanted, normed = by_loops(y, bias, by, doubled, gamma, shape)
    naive.conv_sum(y, bias, by, doubled, total=total, normed=slab[:, 6:12], gamma=gamma, silu=False)
    assert (total - wanted).abs().max() < 1e-14 and (slab[:, 6:12] - normed).abs().max() < 1e-13
    assert slab[:, :6].isnan().all() and slab[:, 12:].isnan().all()


def test_strips_do_not_matter(monkeypatch):
    doubled = Doubled(1, 1, times=2, frame=1)
    found = []
    for strip in (1, 2**20):
        monkeypatch.setitem(naive.STRIP, "cpu", strip)
        y, bias, by, gamma = terms(doubled, 6, 7, 5, torch.float64, "cpu")
        total, slab = places(6, 7, 5, torch.float64, "cpu")
        naive.conv_sum(y, bias, by, doubled, total=total, normed=slab[:, :6], gamma=gamma)
        found.append((total, slab[:, :6].clone()))
    assert all((one - other).abs().max() < 1e-13 for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("doubled", CASES)
@pytest.mark.parametrize(("channels", "height", "width"), [(12, 5, 7), (96, 3, 70), (16, 1, 1)])
def test_the_kernel_is_plain_torch(device, dtype, doubled, channels, height, width):
    from t3.kernels.conv_sum.kernel import conv_sum

    found = []
    for work in (naive.conv_sum, conv_sum):
        y, bias, by, gamma = terms(doubled, channels, height, width, dtype, device)
        total, slab = places(channels, height, width, dtype, device)
        work(y, bias, by, doubled, total=total, normed=slab[:, channels : 2 * channels], gamma=gamma)
        found.append((total.double(), slab[:, channels : 2 * channels].double()))
        assert slab[:, :channels].isnan().all() and slab[:, 2 * channels :].isnan().all(), "written beside the place"
    for plain, kernel in zip(*found, strict=True):
        assert torch.isfinite(kernel).all(), "not all was written"
        assert ((kernel - plain).abs() <= ROUNDING[dtype] * plain.abs().clamp_min(1)).all()


@pytest.mark.parametrize("parts", ["y", "y bias", "y by"])
@pytest.mark.parametrize("silu", [True, False])
def test_any_of_the_terms_and_results(device, parts, silu):
    from t3.kernels.conv_sum.kernel import conv_sum

    y, bias, by, gamma = terms(None, 20, 4, 9, torch.float32, device)
    given = {"bias": bias if "bias" in parts else None, "by": by if "by" in parts else None}
    found = []
    for work in (naive.conv_sum, conv_sum):
        total, slab = places(20, 4, 9, torch.float32, device)
        work(y.clone(memory_format=LAST), **given, total=total)
        work(y.clone(memory_format=LAST), **given, normed=slab[:, 40:], gamma=gamma, silu=silu)
        found.append((total, slab[:, 40:]))
    for plain, kernel in zip(*found, strict=True):
        assert (kernel - plain).abs().max() < 1e-5


@pytest.mark.parametrize("doubled", CASES[:3:2])
def test_what_is_read_may_lie_otherwise(device, doubled):
    """Slower, with its channels not last; what is written to has them last always."""
    from t3.kernels.conv_sum.kernel import conv_sum

    found = []
    for lies in (torch.channels_last, torch.contiguous_format):
        y, bias, by, _ = terms(doubled, 12, 5, 6, torch.float32, device)
        total, _ = places(12, 5, 6, torch.float32, device)
        conv_sum(y.contiguous(memory_format=lies), bias, by.contiguous(memory_format=lies), doubled, total=total)
        found.append(total)
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


def test_nothing_but_zeros_has_a_norm(device):
    """As torch's `normalize`: zeros, not a division by nothing."""
    from t3.kernels.conv_sum.kernel import conv_sum

    y = torch.zeros(1, 8, 2, 3, device=device).contiguous(memory_format=LAST)
    place = torch.full_like(y, torch.nan)
    conv_sum(y, normed=place, gamma=torch.ones(8, device=device))
    assert (place == 0).all()


def test_offsets_beyond_32_bits(device):
    if device == "cpu":
        pytest.skip("needs 13 GB of a GPU's memory")
    from t3.kernels.conv_sum.kernel import conv_sum

    height = 2**31 // (96 * 1024) + 3
    y = torch.randn(1, 96, 1, 1024, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    whole = torch.empty(1, 96, height, 1024, device=device, dtype=torch.bfloat16, memory_format=LAST).fill_(torch.nan)
    place = torch.empty_like(whole).fill_(torch.nan)
    whole[:, :, -1:] = y
    whole[:, :, :1] = y
    conv_sum(whole, total=place)
    assert torch.equal(place[:, :, -1:], y) and torch.equal(place[:, :, :1], y)


def test_the_same_every_time(device):
    from t3.kernels.conv_sum.kernel import conv_sum

    y, bias, by, gamma = terms(None, 96, 6, 40, torch.bfloat16, device)
    found = []
    for _ in range(3):
        total, slab = places(96, 6, 40, torch.bfloat16, device)
        conv_sum(y, bias, by, total=total, normed=slab[:, :96], gamma=gamma)
        found.append((total, slab[:, :96].clone()))
    assert all(torch.equal(one, other) for more in found[1:] for one, other in zip(found[0], more, strict=True))
