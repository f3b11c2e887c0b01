"""Attention with one wide head in Triton, against float64."""

from __future__ import annotations

import math

import pytest
import torch


def reference(q, k, v):
    q, k, v = (x.double() for x in (q, k, v))
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=-1) @ v


def parts(batch, tokens, channels, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * channels, generator=generator)
    return qkv.to(dtype).to(device).chunk(3, dim=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "channels"), [(2, 70, 384), (1, 256, 384), (1, 33, 257), (1, 5, 512)])
def test_no_further_from_float64_than_torch(device, dtype, batch, tokens, channels):
    from t3.kernels.wide_attention.kernel import wide_attention

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    q, k, v = parts(batch, tokens, channels, dtype, device)
    wanted = reference(q, k, v)
    found = wide_attention(q, k, v)
    assert found.shape == q.shape and found.is_contiguous() and found.dtype == dtype
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v)))[:, 0]
    ours, theirs = ((x.double() - wanted).square().mean().sqrt() for x in (found, theirs))
    # Weights are rounded to the dtype before their product, as on any GPU; torch on a CPU keeps them in float32.
    bound = 2 * theirs if device == "cuda" else 2**-10 * wanted.abs().max()
    assert ours <= bound + 1e-6


def test_large_scores(device):
    """Scores far apart: no overflow, and the largest takes all."""
    from t3.kernels.wide_attention.kernel import wide_attention

    q, k, v = parts(1, 40, 384, torch.float16, device)
    q, k, v = 30 * q, 30 * k, v.contiguous()
    found = wide_attention(q, k, v)
    wanted = reference(q, k, v)
    assert torch.isfinite(found).all() and (found.double() - wanted).abs().max() < 0.05


def test_which_queries_it_takes(device):
    from t3.kernels.wide_attention.kernel import fits

    for channels in (256, 513):
        assert not fits(torch.empty(1, 4, channels, dtype=torch.bfloat16, device=device))
    assert not fits(torch.empty(1, 4, 384, dtype=torch.float32, device=device))
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        assert fits(torch.empty(1, 4, 384, dtype=torch.bfloat16, device=device))
