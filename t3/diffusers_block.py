"""A block of a diffusers Wan transformer by chunks of tokens: what its own forward computes, in less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock
from torch import nn

from .block import Linear, Projections, Windows, attend, by_chunks
from .chunks import of_tokens, side_by_side, token_chunks
from .diffusers_text import TextAttention
from .feed_forward import feed_forward, gelu_of_linear
from .fused import norm_weight
from .kernels.add_norm.op import add_, add_norm
from .memory import BlockShape, Share

if TYPE_CHECKING:
    from .parallel.sequence import Spread

# Named here for torch.compile, which does not look these up on their classes.
_WHOLE, _WHOLE_VACE = WanTransformerBlock.forward, WanVACETransformerBlock.forward
# `windows(attn1)`, the share, and the ranks the tokens are spread among; or None where self-attention is not ours.
Attention = Callable[[Any], "tuple[Windows, Share, Spread | None] | None"]


class BlockByChunks:
    """Stands in for the `forward` of one block; `attention` tells what its self-attention is to attend."""

    def __init__(self, block: nn.Module, attention: Attention, say: Callable[[str], None]) -> None:
        self.block = block
        self.attention = attention
        self.say = say

    def install(self) -> None:
        """Take the place of the block's forward."""
        self.block.forward = self._vace if type(self.block) is WanVACETransformerBlock else self._plain

    def remove(self) -> None:
        """Give the block its own forward back, unless somebody has wrapped ours since."""
        if vars(self.block).get("forward") in (self._plain, self._vace):
            del self.block.forward

    def _plain(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        """As `WanTransformerBlock.forward`; `hidden_states` is not written to."""
        chunks = self._chunks(hidden_states)
        if chunks is None:
            return _WHOLE(self.block, hidden_states, encoder_hidden_states, temb, rotary_emb)
        return self._run(hidden_states, encoder_hidden_states, temb, rotary_emb, chunks)

    def _vace(self, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb):
        """As `WanVACETransformerBlock.forward`."""
        block: Any = self.block
        chunks = self._chunks(control_hidden_states)
        if chunks is None:
            return _WHOLE_VACE(block, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb)
        control = control_hidden_states
        if block.proj_in is not None:
            control = block.proj_in(control) + hidden_states
        control = self._run(control, encoder_hidden_states, temb, rotary_emb, chunks)
        return (None if block.proj_out is None else block.proj_out(control)), control

    def _chunks(self, x: torch.Tensor) -> list[slice] | None:
        """The chunks, or None where the block's own forward is to run."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        block: Any = self.block
        batch, tokens, dim = x.shape
        last = next((layer for layer in reversed(list(block.ffn.modules())) if isinstance(layer, nn.Linear)), None)
        inner = 4 * dim if last is None else last.in_features
        shape = BlockShape(dim, inner, block.attn1.heads, batch, tokens, x.element_size())
        chunks = token_chunks(tokens, batch, shape.chunk)
        if len(chunks) == 1:
            return None
        why = _changed(block)
        if why is not None:
            self.say(f"blocks run whole, which takes more memory: {why}.")
        return chunks if why is None else None

    def _run(self, x, text, temb, rotary, chunks: list[slice]) -> torch.Tensor:
        block: Any = self.block
        modulation = partial(_modulation, block.scale_shift_table, temb, x.shape[1])
        table = None if temb.ndim == 4 else modulation(None)

        def six(rows: slice) -> tuple[torch.Tensor, ...]:
            return modulation(rows) if table is None else table

        def normed(rows: slice) -> torch.Tensor:
            shift, scale, *_ = six(rows)
            return add_norm(side_by_side(x[:, rows]), scale=scale, shift=shift, eps=block.norm1.eps)

        ours = self.attention(block.attn1)
        projections = None if ours is None else _projections(block.attn1, x, normed, rotary)
        arriving: Iterable[slice] = chunks
        if ours is None or projections is None:
            update = block.attn1(normed(slice(0, x.shape[1])), None, None, rotary)
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        else:
            windows, share, spread = ours
            if spread is None:
                out = attend(projections, windows, share if projections.in_parts else Share(share.heads), chunks)
            else:
                from .parallel.sequence import attend_projections

                out, arriving = attend_projections(projections, windows, spread, share.heads, chunks)
            update = None
        del projections
        up, down = block.ffn.net[0].proj, block.ffn.net[2]
        attend_to_text: Callable[[torch.Tensor], torch.Tensor] = partial(
            block.attn2, encoder_hidden_states=text, attention_mask=None, rotary_emb=None
        )
        # What set_attention_backend asked for is diffusers' to call.
        if ours is not None and block.attn2.processor._attention_backend is None:
            attend_to_text = TextAttention(block.attn2, text, ours[0].backend, self.say)

        def rest(rows: slice, slot: torch.Tensor) -> None:
            _, _, gate, shift, scale, last_gate = six(rows)
            # A matrix product of rows that do not follow each other would round otherwise.
            y = block.attn1.to_out[1](block.attn1.to_out[0](slot.contiguous())) if update is None else update[:, rows]
            before = side_by_side(x[:, rows])
            if isinstance(block.norm2, nn.Identity):
                add_(before, y, gate, into=slot)
                between = slot.contiguous()
            else:
                weight, bias = block.norm2.weight.float(), block.norm2.bias.float()
                between = add_norm(before, y, gate, weight=weight, bias=bias, eps=block.norm2.eps, into=slot)
            y = attend_to_text(between)
            between = add_norm(slot, y, scale=scale, shift=shift, eps=block.norm3.eps)
            del y
            add_(slot, feed_forward(between, up, down), last_gate)

        return by_chunks(out, arriving, rest)


class GeluOfProduct(GELU):
    """diffusers' layer, with the GELU and the product before it as `feed_forward.gelu_of_linear` has them.

    A class of its own: to a forward put into each layer torch.compile would compile each block anew.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As `GELU.forward` in its tanh form."""
        return gelu_of_linear(hidden_states, self.proj)


def fuse_gelu(block: Any) -> None:
    """Have a block that runs whole compute its GELU with the product before it."""
    if _strange_feed_forward(block) is None:
        block.ffn.net[0].__class__ = GeluOfProduct


def plain_gelu(block: Any) -> None:
    """Undo `fuse_gelu`."""
    for layer in block.ffn.modules():
        if type(layer) is GeluOfProduct:
            layer.__class__ = GELU


def _modulation(table: torch.Tensor, temb: torch.Tensor, tokens: int, rows: slice | None) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate of self-attention, then of the feed-forward, float32: `[B, 1, dim]`, or of these tokens."""
    if temb.ndim == 3:
        return (table.to(temb.device) + temb.float()).chunk(6, dim=1)
    assert rows is not None
    some = of_tokens(temb.flatten(2), rows, tokens).unflatten(2, (6, -1))
    return (table.unsqueeze(0) + some.float()).unbind(2)


def _changed(block: Any) -> str | None:
    """What in this block is not as diffusers made it, in words, or None."""
    norms = (block.norm1, block.norm2, block.norm3)
    if any(_offloaded(module) for module in block.modules()):
        return "group offload brings each layer's weights at each call"
    if any(type(norm) not in (FP32LayerNorm, nn.Identity) or _watched(norm) for norm in norms):
        return "a norm is of another kind"
    if why := _strange_feed_forward(block):
        return why
    if type(block.attn2.processor) is not WanAttnProcessor or _watched(block.attn2) or _watched(block.attn1):
        return "its attention is of another kind, or watched"
    if getattr(block.attn1.processor, "_parallel_config", None) is not None:
        return "its tokens are spread over several cards"
    return None


def _strange_feed_forward(block: Any) -> str | None:
    """The same for its feed-forward."""
    ffn = block.ffn
    net: Any = getattr(ffn, "net", ())
    if type(ffn) is not FeedForward or _watched(ffn) or len(net) != 3 or type(net[0]) is not GELU or _watched(net[0]):
        return "its feed-forward is of another kind"
    return None if net[0].approximate == "tanh" else f"its GELU is {net[0].approximate!r}"


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _offloaded(module: nn.Module) -> bool:
    hooks = getattr(module, "_diffusers_hook", None)
    return hooks is not None and hooks.get_hook("group_offloading") is not None


def _projections(
    attn: Any, x: torch.Tensor, tokens: Callable[[slice], torch.Tensor], rotary: Any
) -> Projections | None:
    """What leads to attention, or None where projections are of a kind that is not known here."""
    if attn.fused_projections:
        if not _plain(attn.to_qkv, x):
            return None
        weights, biases = attn.to_qkv.weight.chunk(3), attn.to_qkv.bias.chunk(3)
        q, k, v = (Linear(partial(F.linear, weight=w, bias=b), w, b) for w, b in zip(weights, biases, strict=True))
    else:
        q, k, v = (_linear(layer, x) for layer in (attn.to_q, attn.to_k, attn.to_v))
    return Projections(
        (x.shape[0], x.shape[1], attn.inner_dim),
        x,
        tokens,
        q,
        k,
        v,
        heads=attn.heads,
        norms=(norm_weight(attn.norm_q, x), norm_weight(attn.norm_k, x)),
        eps=attn.norm_q.eps,
        turns=None if rotary is None else turns(*rotary),
    )


def turns(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each pair of channels. diffusers' tables, `[1, N, 1, head_dim]`, have each of them twice."""
    return cos[:, :, 0, 0::2], sin[:, :, 0, 1::2]


def _plain(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether this is torch's own linear layer, in x's dtype and on its device."""
    own = type(layer) is nn.Linear and not _watched(layer)
    return own and layer.weight.dtype == x.dtype and layer.weight.device == x.device


def _linear(layer: Any, x: torch.Tensor) -> Linear:
    return Linear(layer, layer.weight, layer.bias) if _plain(layer, x) else Linear(layer)
