"""How a block may share out its work to save memory, what each way needs, and which fits. Pure Python, no torch.

A block holds its input and one tensor of that size that becomes its output. Beside them it needs queries, keys and
values, and copies of these in the order of the windows. All other work goes by chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

AUTO, FAST, LEAN = MODES = ("auto", "fast", "lean")
# Bytes that a chunk of tokens takes inside the feed-forward, the widest step of a block: small beside a video's
# tensors, while the matrix products stay large.
CHUNK_BYTES = 2**29
# Heads work in so many groups where memory is short: what they need is then little beside what is there in any case.
MOST_GROUPS = 12
# Most that keys and values of windows, joined with those of tokens beside the grid, take at once.
JOINED_BYTES = 2**30
GIB = 2**30


class Share(NamedTuple):
    """How attention is shared out: into groups of `heads` (None: all, and all groupings' copies at once), of
    projections made in `parts` (1: of all heads at once)."""

    heads: int | None = None
    parts: int = 1

    def __str__(self) -> str:
        if self.heads is None:
            return "fast: all heads at once"
        text = f"lean: {self.heads} head{'s' if self.heads > 1 else ''} at a time"
        return text + (f", projected in {self.parts} parts" if self.parts > 1 else "")


class BlockShape(NamedTuple):
    """What a block's memory depends on: width, width inside the feed-forward, heads, samples, tokens, bytes of one
    activation, and how many of the tokens stand beside the grid."""

    dim: int
    ffn_dim: int
    heads: int
    batch: int
    tokens: int
    element: int = 2
    beside: int = 0

    @property
    def tensor(self) -> int:
        """Bytes of the block's input."""
        return self.batch * self.tokens * self.dim * self.element

    @property
    def chunk(self) -> int:
        """Rows (samples x tokens) of one chunk."""
        return max(1, min(CHUNK_BYTES // (self.ffn_dim * self.element), self.batch * self.tokens))


def shares(heads: int, parts: bool = True) -> list[Share]:
    """The ways worth having for so many heads, from fast to lean.

    parts: whether projections can be made in parts, for which their weights must be there as plain tensors.
    """
    sizes = dict.fromkeys(max(1, -(-heads // groups)) for groups in (2, 4, MOST_GROUPS))
    found = [Share(), *(Share(size) for size in sizes)]
    least = found[-1].heads
    return found + [Share(least, n) for n in (2, 3, 4) if parts and n <= heads]


def joined_bytes(queries: int) -> int:
    """Bytes that keys and values of windows, joined with those of tokens beside the grid, may take where the queries at
    work take `queries`. One window of one head is attended even if it needs more."""
    return min(JOINED_BYTES, 2 * queries)


def block_bytes(shape: BlockShape, share: Share) -> int:
    """Bytes of a block at its peak, input and output included, weights not, of two groupings that differ.

    Fast: input, q, k, v for both groupings, a result. Lean: input, q (which becomes the output), k, v, and for the
    heads at work q, k, v once more and a result of either grouping. In parts: the same, but q, k, v of one part only,
    and an output beside them. Tokens beside the grid: `joined_bytes` more.
    """
    one, chunk = shape.tensor, shape.chunk
    projected = 4 * chunk * shape.dim * shape.element
    if share.heads is None:
        joined = joined_bytes(one) if shape.beside else 0
        attention = 7 * one + max(one + joined, projected)
    else:
        queries = one * share.heads // shape.heads
        group = 5 * queries + (joined_bytes(queries) if shape.beside else 0)
        held = one * -(-shape.heads // share.parts) // shape.heads
        attention = (one if share.parts == 1 else 2 * one) + 3 * held + max(group, projected)
    rest = 2 * one + chunk * (shape.ffn_dim + 3 * shape.dim) * shape.element
    return max(attention, rest)


def plain_block_bytes(shape: BlockShape) -> int:
    """The same of a block that is run whole, as under torch.compile: the feed-forward's inner tensor twice beside the
    input, its normed copy and the output; or attention over all heads."""
    one = shape.tensor
    joined = joined_bytes(one) if shape.beside else 0
    return max(3 * one + 2 * shape.batch * shape.tokens * shape.ffn_dim * shape.element, 10 * one + joined)


def pick(mode: str, ways: Sequence[Share], needed: Callable[[Share], float], free: float) -> tuple[Share, str]:
    """The way to go and why, in words. mode: one of `MODES`; needed: bytes of a way; free: bytes there are.

    `auto` takes the fastest that fits, or the leanest where none does.
    """
    if mode != AUTO:
        share = ways[0] if mode == FAST else ways[-1]
        return share, f"{share}, as chosen; it needs {needed(share) / GIB:.1f} GiB."
    share = next((way for way in ways if needed(way) <= free), ways[-1])
    text = f"{share}; it needs {needed(share) / GIB:.1f} GiB of {free / GIB:.1f} GiB free."
    if needed(share) > free:
        text += " That is too little, and it may fail: use a smaller size or fewer frames."
    elif share != ways[0]:
        text += f" The fastest way needs {needed(ways[0]) / GIB:.1f} GiB."
    return share, text
