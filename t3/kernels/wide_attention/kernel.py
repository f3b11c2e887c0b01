"""Attention with one head of 257 to 512 channels as a Triton kernel that stores no scores.

Library kernels end at a head size of 256, and what torch falls back to then runs at an eighth of an H100's rate. The
head is cut in two parts, since a block's sides are powers of two; the products of both go into the same scores.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_FIRST = 256
# Measured on an H100 with 384 channels, 130,560 tokens: 75 ms. Keys 32 in 2 stages: 79. Rows 64: 119 and more. Keys 64
# in 1 stage: 110. torch's memory-efficient attention: 288. Scores by cuBLAS in float32, in chunks: 219 and more.
_ROWS, _KEYS, _WARPS, _STAGES = 128, 16, 8, 3


@triton.jit
def _attend(
    q,
    k,
    v,
    out,
    tokens,
    scale,
    batch_stride,
    token_stride,
    out_batch,
    out_token,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One program: `ROWS` queries over all keys. scale: of the scores, times log2(e)."""
    batch = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    keys = tl.arange(0, KEYS).to(tl.int64)[:, None]
    one, two = tl.arange(0, FIRST)[None, :], FIRST + tl.arange(0, SECOND)[None, :]
    there = rows < tokens
    at = q + batch * batch_stride + rows * token_stride
    q1 = tl.load(at + one, mask=there, other=0.0)
    q2 = tl.load(at + two, mask=there & (two < CHANNELS), other=0.0)
    k_at = k + batch * batch_stride + keys * token_stride
    v_at = v + batch * batch_stride + keys * token_stride
    most = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    sum1 = tl.zeros([ROWS, FIRST], tl.float32)
    sum2 = tl.zeros([ROWS, SECOND], tl.float32)
    for start in range(0, tokens, KEYS):
        inside = keys < tokens - start
        k1, k2 = _load(k_at, one, two, inside, CHANNELS, FIRST + SECOND, EVEN)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
        if not EVEN:
            scores = tl.where(start + tl.arange(0, KEYS)[None, :] < tokens, scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, axis=1) * scale)
        p = tl.math.exp2(scores * scale - now[:, None])
        fade = tl.math.exp2(most - now)
        weight = weight * fade + tl.sum(p, axis=1)
        most = now
        sum1 *= fade[:, None]
        sum2 *= fade[:, None]
        p = p.to(q.dtype.element_ty)
        v1, v2 = _load(v_at, one, two, inside, CHANNELS, FIRST + SECOND, EVEN)
        sum1 = tl.dot(p, v1, sum1, input_precision="ieee")
        sum2 = tl.dot(p, v2, sum2, input_precision="ieee")
        k_at += KEYS * token_stride
        v_at += KEYS * token_stride
    at = out + batch * out_batch + rows * out_token
    tl.store(at + one, (sum1 / weight[:, None]).to(out.dtype.element_ty), mask=there)
    tl.store(at + two, (sum2 / weight[:, None]).to(out.dtype.element_ty), mask=there & (two < CHANNELS))


@triton.jit
def _load(at, one, two, inside, CHANNELS: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr):
    """Rows of both parts; zeros for rows and channels that there are not."""
    if EVEN and CHANNELS == PADDED:
        return tl.load(at + one), tl.load(at + two)
    return (
        tl.load(at + one, mask=inside, other=0.0),
        tl.load(at + two, mask=inside & (two < CHANNELS), other=0.0),
    )


def fits(q: torch.Tensor) -> bool:
    """Whether the kernel takes these queries, `[B, tokens, channels]`, on their device."""
    if not _FIRST < q.shape[2] <= 2 * _FIRST or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    held = _ROWS + _STAGES * 2 * _KEYS
    wide = _FIRST + _second(q.shape[2])
    limit = triton.runtime.driver.active.utils.get_device_properties(q.device.index or 0)["max_shared_mem"]
    return held * wide * q.element_size() <= limit


def wide_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of `[B, tokens, channels]` with one head, scaled by 1 / sqrt(channels).

    256 < channels <= 512; q, k and v have the same strides, the last 1 (parts of one tensor have). The products are
    those of the dtype, summed in float32. Returns a contiguous tensor of the shape and dtype of q.
    """
    batch, tokens, channels = q.shape
    assert q.stride() == k.stride() == v.stride() and q.stride(2) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attend[(triton.cdiv(tokens, _ROWS), batch)](
        q,
        k,
        v,
        out,
        tokens,
        math.log2(math.e) / math.sqrt(channels),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        CHANNELS=channels,
        FIRST=_FIRST,
        SECOND=_second(channels),
        ROWS=_ROWS,
        KEYS=_KEYS,
        EVEN=tokens % _KEYS == 0,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return out


def _second(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels - _FIRST))
