"""FlexAttention with a mask that is equivalent to windows."""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 128


def block_tables(ids: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of queries meet which blocks of keys: bool `[blocks, blocks]`, partly and fully attended.

    ids: the window of each token, never falling: tokens are grouped by windows first, since strided windows leave no
    block of token order empty. Built from the windows' borders: trying all pairs of tokens, as `create_block_mask`
    does, is 5e11 of them at 4K.
    """
    tokens = ids.shape[0]
    starts = torch.arange(0, tokens, block, device=ids.device)
    ends = (starts + block).clamp(max=tokens)
    first, last = ids[starts], ids[ends - 1]
    meets = (last[:, None] >= first[None]) & (last[None] >= first[:, None])
    # A block that ends early needs the mask for its missing tokens.
    within = (first == last) & (ends - starts == block)
    full = within[:, None] & within[None] & (first[:, None] == first[None])
    return meets & ~full, full


def flex_windows(ids: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Attention of `[1, N, heads, head_dim]` tokens in windows `ids` (as in `block_tables`), by FlexAttention.

    Compiled on a card. On a CPU, where it is here to be tried only, run as it is.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def same_window(b, h, query, key):
        return ids[query] == ids[key]

    def ordered(present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = present.sum(-1, dtype=torch.int32)
        places = present.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return count[None, None], places[None, None]

    partly, fully = (ordered(present) for present in block_tables(ids))
    lengths = (ids.shape[0], ids.shape[0])
    mask = BlockMask.from_kv_blocks(*partly, *fully, BLOCK_SIZE=BLOCK, mask_mod=same_window, seq_lengths=lengths)
    attend = torch.compile(flex_attention, dynamic=False) if ids.device.type == "cuda" else flex_attention

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
        return out.transpose(1, 2)

    return run
