"""Cross-attention over short texts: the zeros that pad a text are a few tokens that count for all of them.

Wan pads a text's embedding with zeros to 512 tokens and masks none of them. Text has no positions, so all of the
padding has one key and one value, and attention over n equal keys is attention over one whose logit is raised by
log(n). A caption of 20 words is 24 tokens then, not 512; what is computed is the same, gradients included.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.nn.functional import scaled_dot_product_attention

from .operator import projected

# Tokens that stand for padding. One would do, were log(n) a number that bfloat16 has: rounded, it would make n wrong by
# up to 1.6 %. The sum over four is right to 1e-6.
PADS = 4
_ROWS = 8  # kernels like a multiple


def rows_for(longest: int, tokens: int) -> int:
    """To how many rows texts of at most `longest` tokens are padded, where the model would have them at `tokens`."""
    return min(tokens, -(-(longest + PADS) // _ROWS) * _ROWS)


def logits(rows: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the logits of `rows` text tokens, `[rows]` in `dtype`: the last `PADS` count for all padding."""
    left = float(tokens - (rows - PADS))
    raised = []
    for _ in range(PADS - 1):
        raised.append(_below(math.log(left), dtype))
        left -= math.exp(raised[-1])
    return torch.tensor([0.0] * (rows - PADS) + [*raised, math.log(left)]).to(dtype)


def _below(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is less than `value` by at least a rounding."""
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    return torch.nextafter(near, torch.full_like(near, -math.inf)).item()


class ShortText:
    """Cross-attention of one block; stands where diffusers' `WanAttnProcessor` stood. `logits` as that function gives
    them; a text of another length is attended to as it is."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None):
        q, k, v = projected(attn, hidden_states, encoder_hidden_states, None)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        raised = self.logits.to(q.dtype).view(1, 1, 1, -1) if k.shape[2] == len(self.logits) else None
        out = scaled_dot_product_attention(q, k, v, attn_mask=raised)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def shorten(transformer: torch.nn.Module, raised: torch.Tensor) -> None:
    """Let every cross-attention of `transformer` take short texts, in place."""
    for module in transformer.modules():
        if isinstance(module, WanAttention) and module.is_cross_attention:
            module.set_processor(ShortText(raised))
