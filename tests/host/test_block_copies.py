"""What a block by chunks copies of its tokens, in bytes: nothing that can be read or written where it lies."""

from __future__ import annotations

import sys

import pytest
import torch
from copies import Copies, attend_like_cudnn
from host_blocks import DIM, HEADS, inputs, make_block, patch

TOKENS = 168


# The share of a tensor of all tokens that is copied; why, where it is not nothing.
CASES = {
    "fast": ({}, {}, 0),
    "image to video": ({"image": 4}, {"kind": "i2v_cross_attn"}, 0),
    "modulation per token": ({"modulations": 168}, {}, 0),
    # For the matrix product after attention: a chunk of two samples is no piece of memory.
    "batch of two": ({"batch": 2}, {}, 1),
    # The first block's input, for the norm before attention and the sum after it.
    "strided": ({"strided": True}, {}, 2),
}


# Windows of one size; frames, one grouping that leaves tokens in their place; windows of two sizes, whose results are
# put together once for each grouping.
PARTITIONS = {"windows": ((2, 3, 1), 0), "frames": ((4, 1, 1), 0), "windows of two sizes": ((2, 3, 2), 2)}


@pytest.mark.parametrize("windows", PARTITIONS)
@pytest.mark.parametrize("case", CASES)
def test_bytes_that_copies_move(t3, monkeypatch, case, windows):
    """By the kernels' operators, with an attention whose result lies as cuDNN's does."""
    changes, kind, tensors = CASES[case]
    partition, together = PARTITIONS[windows]
    assert_copied(t3, monkeypatch, changes, kind, tensors + together, partition=partition)


@pytest.mark.parametrize("windows", PARTITIONS)
@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_of_few_heads_at_a_time(t3, monkeypatch, heads, windows):
    """Frames: results are put in the place of their queries."""
    partition, together = PARTITIONS[windows]
    tensors = 1 if windows == "frames" else together
    share = t3.memory.Share(heads)
    assert_copied(t3, monkeypatch, {}, {}, tensors, partition=partition, share=share)


def assert_copied(t3, monkeypatch, changes, kind, tensors, **how):
    """That a block's copies move so many tensors of all tokens."""
    monkeypatch.setattr(t3.fused, "triton_usable", lambda device, dtype: True)
    backends = sys.modules[f"{t3.pack.__name__}.t3.backends"]
    block = make_block(**kind, dtype=torch.float32)
    ours = patch(t3, block, **how, backend=backends.Backend("like cuDNN", "", attend_like_cudnn))
    arguments = inputs(**changes, dtype=torch.float32)
    batch = changes.get("batch", 1)
    with torch.no_grad():
        ours.forward(**arguments, transformer_options={})
        # The last chunk is the smallest, 8 tokens; of one head of them.
        with Copies(least=8 * batch * DIM // HEADS * 4) as counted:
            ours.forward(**arguments, transformer_options={})
    assert counted.moved == tensors * batch * TOKENS * DIM * 4, counted.found
