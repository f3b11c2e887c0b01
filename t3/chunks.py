"""Tokens in chunks, for the parts of a block in which tokens do not see each other."""

from __future__ import annotations

import torch

# Chunks are whole multiples of this, for matrix products that fill their tiles.
TILE = 128


def token_chunks(tokens: int, batch: int, rows: int) -> list[slice]:
    """All tokens in as few even slices as have at most `rows` rows, samples counted, or one tile where that is more."""
    size = max(1, rows // batch)
    if size >= tokens:
        return [slice(0, tokens)]
    even = -(-tokens // -(-tokens // size))
    size = max(TILE, min(-(-even // TILE) * TILE, size // TILE * TILE))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x `[B, n, dim]` with the channels of each token side by side, which those of the patch embedding are not."""
    return x if x.stride(2) == 1 else x.contiguous()


def of_tokens(modulation: torch.Tensor, rows: slice, tokens: int) -> torch.Tensor:
    """Of a modulation `[B, m, dim]`, what the tokens `rows` of `tokens` get: `[B, 1 or len(rows), dim]`.

    m is 1, the number of tokens, or less where each stands for equally many tokens in a row, the last for fewer.
    """
    given = modulation.shape[1]
    if given == 1:
        return modulation
    if given == tokens:
        return modulation[:, rows]
    each = tokens // given + (tokens % given > 0)
    first, last = rows.start // each, (rows.stop - 1) // each
    few = modulation[:, first : last + 1].repeat_interleave(each, dim=1)
    return few[:, rows.start - first * each : rows.stop - first * each]
