"""A Wan block by chunks of tokens: what its host computes, without tensors of the feed-forward's size.

Stands in for the `forward` of `WanAttentionBlock` and, inside, of `VaceWanAttentionBlock`. Patches of other nodes hold:
self-attention or cross-attention with a forward of somebody else's gets all tokens at once, and where anything else of
a block is not as the host made it, the host's own forward runs. Where nobody chose an attention, what attends windows
attends the text too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..t3.block import by_chunks
from ..t3.chunks import of_tokens, side_by_side, token_chunks
from ..t3.feed_forward import feed_forward
from ..t3.kernels.add_norm.op import add_, add_norm
from ..t3.memory import BlockShape
from ..t3.text_attention import say_nothing
from . import lend, projections
from .host_attention import chosen_by_user, host_attention, with_ours
from .stand_in import StandIn, changed_by, stop_if_cancelled


class T3Block(StandIn):
    """Stands in for the `forward` of one block of the host's; computes the same, in less memory."""

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        freqs: torch.Tensor,
        context: torch.Tensor,
        context_img_len: int | None = 257,
        transformer_options: dict | None = None,
    ) -> torch.Tensor:
        """As `WanAttentionBlock.forward`. `x`, `[B, N, dim]`, is not written to: somebody may hold it."""
        from comfy.ldm.wan.model import WanAttentionBlock

        options = {} if transformer_options is None else transformer_options
        plainly = torch.compiler.is_compiling() or torch.is_grad_enabled() or not _as_made(self.module)
        chunks = [] if plainly else _chunks(self.module, x)
        if len(chunks) < 2:
            if torch.compiler.is_compiling() and not torch.is_grad_enabled():
                options = self.with_our_text(options, say_nothing)
            return WanAttentionBlock.forward(self.module, x, e, freqs, context, context_img_len, options)
        stop_if_cancelled(x)
        cross = {"context": context, "context_img_len": context_img_len, "transformer_options": options}
        return _Pass(self, x, e, chunks).run(freqs, cross, options)

    def with_our_text(self, options: dict, say: Callable[[str], None]) -> dict:
        """`options` by which what attends windows attends the text too, where nobody chose or patched an attention."""
        current = self.installation.current
        if current is None or current.backend is None or chosen_by_user(options) is not None:
            return options
        return options if _cross_attention_of(self.module) else with_ours(options, current.backend, say)


class T3VaceBlock(StandIn):
    """The same for `VaceWanAttentionBlock`, whose forward takes the tokens of its own stream first."""

    def forward(self, c: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VaceWanAttentionBlock.forward`."""
        block: Any = self.module
        if block.block_id == 0:
            c = block.before_proj(c) + x
        c = T3Block(self.module, self.layer, self.installation).forward(c, **kwargs)
        return block.after_proj(c), c


class T3FeedForward(StandIn):
    """Stands in for the `forward` of a block's feed-forward where the block runs whole: compiled, or of few tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward; the GELU goes with the product before it where that can be."""
        ffn: Any = self.module
        if not _known_feed_forward(ffn):
            return type(ffn).forward(ffn, x)
        up, _, down = ffn
        return feed_forward(x, up, down)


def _as_made(block: Any) -> bool:
    """Whether all of a block but its attention is what the host makes: else its own forward must run."""
    ffn, norms = block.ffn, (block.norm1, block.norm2, block.norm3)
    return _known_feed_forward(ffn) and not any(map(changed_by, (ffn, *norms)))


def _known_feed_forward(ffn: Any) -> bool:
    known = type(ffn) is torch.nn.Sequential and len(ffn) == 3 and type(ffn[1]) is torch.nn.GELU
    return known and ffn[1].approximate == "tanh" and changed_by(ffn[1]) is None


def _chunks(block: Any, x: torch.Tensor) -> list[slice]:
    batch, tokens, dim = x.shape
    shape = BlockShape(dim, block.ffn_dim, block.num_heads, batch, tokens, x.element_size())
    return token_chunks(tokens, batch, shape.chunk)


class _Pass:
    """One call of a block."""

    def __init__(self, patch: T3Block, x: torch.Tensor, e: torch.Tensor, chunks: list[slice]) -> None:
        import comfy.model_management

        block: Any = patch.module
        self.patch, self.block, self.x, self.chunks = patch, block, x, chunks
        table = comfy.model_management.cast_to(block.modulation, dtype=x.dtype, device=x.device)
        self.modulation = (table + e).chunk(6, dim=1) if e.ndim == 3 else (table.unsqueeze(0) + e).unbind(2)

    def run(self, freqs: torch.Tensor, cross: dict, options: dict) -> torch.Tensor:
        """The block's output, a tensor of its own."""
        patches = options.get("patches", {})
        current, say = self.patch.installation.current, self.patch.installation.say
        out = self._attended(freqs, options, patches)
        if out is None:
            # Somebody else's self-attention, or the host's: it gets all tokens, and its output is projected already.
            update = self.block.self_attn(self._normed(slice(None)), freqs, transformer_options=options)
            out, project = torch.empty_like(self.x, memory_format=torch.contiguous_format), None
        else:
            update, project = None, lend.linear(self.block.self_attn.o, self.x)
        chosen = chosen_by_user(options)
        owner = _cross_attention_of(self.block)
        lean = current is not None and current.share.heads is not None
        by_chunks_too = owner is None and (chosen is None or lean)
        if owner is not None:
            say(f"cross-attention is that of {owner} and gets all tokens at once, which takes more memory.")
        elif chosen is not None and by_chunks_too:
            # Whoever cuts up the whole video where told its layout must not take a chunk for it.
            cross = {**cross, "transformer_options": {k: v for k, v in options.items() if k != "grid_sizes"}}
        else:
            cross = {**cross, "transformer_options": self.patch.with_our_text(options, say)}
        finish = _FeedForward(self)
        whole = not by_chunks_too or "attn2_patch" in patches

        def rest(rows: slice, slot: torch.Tensor) -> None:
            # A matrix product of rows that do not follow each other would round otherwise.
            y = project.call(slot.contiguous()) if project else update[:, rows]
            x, gate = side_by_side(self.x[:, rows]), self._of(2, rows)
            if whole:
                add_(x, y, gate, into=slot)
                return
            normed = self._add_norm(x, y, gate, slot)
            del x, y
            finish(rows, slot, self.block.cross_attn(normed, **cross))

        if not whole:
            return by_chunks(out, self.chunks, rest)
        return self._rest_at_once(out, rest, finish, cross, patches.get("attn2_patch", ()), options)

    def _rest_at_once(self, out, residual, finish, cross: dict, patches, options: dict) -> torch.Tensor:
        """Cross-attention of all tokens at once, and what other nodes do after it."""
        by_chunks(out, self.chunks, residual)
        add_(out, self.block.cross_attn(self.block.norm3(out), **cross))
        for patch in patches:
            out = patch({"x": out, "transformer_options": options})
        if not patches:
            return by_chunks(out, self.chunks, finish)
        # A patch may have kept what it gave back.
        given, out = out, torch.empty_like(out, memory_format=torch.contiguous_format)

        def from_given(rows: slice, slot: torch.Tensor) -> None:
            slot.copy_(given[:, rows])
            finish(rows, slot)

        return by_chunks(out, self.chunks, from_given)

    def _of(self, which: int, rows: slice) -> torch.Tensor:
        """Of one of the six modulations, what these tokens get."""
        if rows == slice(None):
            rows = slice(0, self.x.shape[1])
        return of_tokens(self.modulation[which], rows, self.x.shape[1])

    def _normed(self, rows: slice) -> torch.Tensor:
        """What self-attention gets of these tokens."""
        return self.normed(self.block.norm1, side_by_side(self.x[:, rows]), self._of(1, rows), self._of(0, rows))

    @staticmethod
    def normed(norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, update=None) -> torch.Tensor:
        """Norm and modulation, after adding `update` to x."""
        if lend.layer_norm(norm) and norm.weight is None:
            return add_norm(x, update, scale=scale, shift=shift, eps=norm.eps)
        if update is not None:
            add_(x, update)
        return torch.addcmul(shift, norm(x), 1 + scale)

    def _add_norm(self, x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """The residual of self-attention, into `slot`, and what cross-attention gets."""
        norm = self.block.norm3
        if lend.layer_norm(norm):
            weight, bias = lend.weights(norm, x)
            return add_norm(x, update, gate, weight=weight, bias=bias, eps=norm.eps, into=slot)
        add_(x, update, gate, into=slot)
        return norm(slot.contiguous())

    def _attended(self, freqs: torch.Tensor, options: dict, patches: dict) -> torch.Tensor | None:
        """Our self-attention before its output projection, or None where it is not ours to compute."""
        from comfy.ldm.wan.model import WanSelfAttention

        attn, current, tokens = self.block.self_attn, self.patch.installation.current, self.x.shape[1]
        partition = None if current is None else current.partitions[self.patch.layer]
        if current is None or partition is None or not current.layout.fits(tokens):
            return None
        if type(attn) is not WanSelfAttention or changed_by(attn) is not None:
            return None
        if projections.refused(attn, tokens, freqs, patches.get("attn1_patch", ())):
            return None
        backend = current.backend or host_attention(options)
        return projections.attend(attn, self.x, self._normed, freqs, current, partition, backend, self.chunks)


class _FeedForward:
    """The last step of a block, with weights that are made ready once."""

    def __init__(self, of: _Pass) -> None:
        up, _, down = of.block.ffn
        self.of, self.up = of, up
        self.lend = lend.lender(up, of.x)
        self.down = lend.linear(down, of.x).call

    def __call__(self, rows: slice, slot: torch.Tensor, update: torch.Tensor | None = None) -> None:
        """Adds `update`, then the feed-forward, to these tokens, in place."""
        of = self.of
        normed = of.normed(of.block.norm2, slot, of._of(4, rows), of._of(3, rows), update)
        add_(slot, feed_forward(normed, self.up, self.down, self.lend), of._of(5, rows))


def _cross_attention_of(block: Any) -> str | None:
    """Whose cross-attention this is, where it is not known to take each token for itself; None if it is the host's."""
    from comfy.ldm.wan.model import WanI2VCrossAttention, WanT2VCrossAttention

    cross = block.cross_attn
    if type(cross) not in (WanT2VCrossAttention, WanI2VCrossAttention):
        return type(cross).__module__
    return changed_by(cross)
