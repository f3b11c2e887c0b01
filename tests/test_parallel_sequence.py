"""What a rank sends, and in which order, before anything is sent: heads in groups, tokens in runs, memory."""

from itertools import pairwise

import pytest
import torch

from t3 import chunks
from t3.backends import BACKENDS
from t3.block import Windows
from t3.errors import T3Error
from t3.memory import BlockShape, block_bytes, shares
from t3.parallel.sequence import Spread, _cut, _Layer, _runs, attend_over_ranks
from t3.plan import Grid, Partition

WINDOWS = Windows(Grid(3, 5, 7), Partition(1, 2, 3), BACKENDS["sdpa"])


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 12, 20])
def test_groups_of_heads_are_alike_and_no_larger_than_memory_allows(heads):
    for groups in (1, 2, 3, 7):
        for most in (None, 1, 2, 3, heads, heads + 1):
            some = Spread(None, 0, 2, groups=groups).at_once(heads, most)
            assert some >= 1 and heads % some == 0
            assert some <= (heads if most is None else most) and heads // some >= min(groups, heads)
    assert Spread(None, 0, 2).at_once(heads, None) == heads, "all at once where memory does not ask for groups"


@pytest.mark.parametrize("heads", [2, 6, 12, 20])
def test_each_leaner_way_needs_less(heads):
    block = BlockShape(128 * 2 * heads, 8960, heads, 1, 342_720)
    spread = Spread(None, 0, 2)
    ways = shares(heads, parts=False)
    needs = [block_bytes(block, way) + spread.more_bytes(block.tensor, heads, way.heads) for way in ways]
    assert all(a > b for a, b in pairwise(needs)), needs


def test_runs_make_up_all_tokens_and_so_do_their_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "TILE", 4)
    for tokens in (0, 1, 5, 53, 100):
        for count in (1, 2, 7):
            runs = _runs(tokens, count)
            assert len(runs) == count
            assert [row for run in runs for row in range(tokens)[run]] == list(range(tokens))
            cut = [some for run in runs for some in _cut(run, 2, 18)]
            assert [row for some in cut for row in range(tokens)[some]] == list(range(tokens))
            assert all(0 < some.stop - some.start <= 9 for some in cut)


def test_no_run_ends_in_a_chunk_of_a_few_tokens():
    """Which every card would have to be given work for: the 1.3B at 4K on two, in four parts."""
    runs = _runs(342_720, 4)
    lengths = [some.stop - some.start for run in runs for some in _cut(run, 1, 28_672)]
    assert len(lengths) == 12 and min(lengths) > 0.9 * max(lengths)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_goes_to_a_rank_lies_together(rank, groups):
    tokens, heads, width = Spread(None, rank, 2).shares(105)[rank], 12, 4
    x = torch.randn(2, tokens, heads * width)
    layer = _Layer(Spread(None, rank, 2, groups=groups), WINDOWS, heads, x.shape, x, None)
    for which in range(3):
        layer.pack(which, x[:, :20] + which, slice(0, 20))
        # As the kernel that norms and turns is told to write.
        layer.places(which)[:, 20:] = (x[:, 20:] + which).unflatten(2, (2, groups, -1))
    for which, packed in enumerate(layer.packed):
        by_head = (x + which).unflatten(2, (heads, width))
        for number in range(groups):
            for to in range(2):
                first = (to * groups + number) * layer.heads
                expected = by_head[:, :, first : first + layer.heads].flatten(2)
                assert packed[number, to].is_contiguous() and torch.equal(packed[number, to], expected)


def test_what_ranks_cannot_share_is_refused():
    qkv = [torch.randn(1, 53, 12)] * 3
    with pytest.raises(T3Error, match="3 heads cannot be shared alike by 2 ranks"):
        attend_over_ranks(qkv, WINDOWS, 3, Spread(None, 0, 2))
    with pytest.raises(T3Error, match="rank 1 of 2 has 53 tokens of a grid of 105; expected 52"):
        attend_over_ranks(qkv, WINDOWS, 4, Spread(None, 1, 2))
    with pytest.raises(T3Error, match="no gradients"):
        attend_over_ranks([x.clone().requires_grad_() for x in qkv], WINDOWS, 4, Spread(None, 0, 2))
