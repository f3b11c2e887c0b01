"""T3 inside a diffusers `WanTransformer3DModel`: a processor and a forward for each block, one hook for the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
    _get_qkv_projections,
)
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

from .attention import t3_attention
from .backends import Backend, Situation, choose
from .block import Windows
from .cost import ModelShape, activation_bytes
from .device_memory import free_bytes
from .diffusers_block import BlockByChunks, fuse_gelu, plain_gelu, turns
from .diffusers_text import TextProcessor
from .fused import attention_from_projections, norm_weight, refusal
from .memory import AUTO, FAST, GIB, LEAN, Share, block_bytes, pick, shares
from .plan import Grid, Partition, Plan

if TYPE_CHECKING:
    from .parallel.sequence import Spread


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels. x: `[B, N, heads, head_dim]`; cos, sin: `[1, N, 1, head_dim]` float, pairs repeated.

    Computed in the wider of the dtypes and stored in x's, as diffusers' own Wan processor does.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


class T3AttentionProcessor:
    """Self-attention of one block under a plan; stands where diffusers' `WanAttnProcessor` stood.

    The hook that `install_t3` sets gives it `grid` and `partition` before each forward. It knows its partition, not
    its layer, so that `torch.compile` shares code between the layers of one partition.
    """

    # diffusers writes to these two from set_attention_backend and enable_parallelism.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, backend: str | Backend = "auto", memory: int | None = None) -> None:
        self.backend = backend
        self.memory = memory
        self.share = Share()
        # The ranks among which tokens are spread, and how; see `parallel.sequence`.
        self.spread: Spread | None = None
        self.grid: Grid | None = None
        self.partition: Partition | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        backend = self.backend if self._attention_backend is None else _through_diffusers(self._attention_backend)
        assert self.grid is not None and self.partition is not None, "the hook of install_t3 has not run"
        if self.spread is not None:
            out = self._over_ranks(attn, q, k, v, rotary_emb, backend)
        elif self.memory is None and refusal(q, k, v) is None:
            out = attention_from_projections(
                q,
                k,
                v,
                self.grid,
                self.partition,
                heads=attn.heads,
                norms=(norm_weight(attn.norm_q, q), norm_weight(attn.norm_k, k)),
                eps=attn.norm_q.eps,
                turns=None if rotary_emb is None else turns(*rotary_emb),
                backend=backend,
            )
        else:
            q, k = attn.norm_q(q), attn.norm_k(k)
            q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
            if rotary_emb is not None:
                q, k = apply_rotary(q, *rotary_emb), apply_rotary(k, *rotary_emb)
            out = t3_attention(q, k, v, self.grid, self.partition, backend=backend, memory=self.memory)
            out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))

    def _over_ranks(self, attn, q, k, v, rotary_emb, backend) -> torch.Tensor:
        """The same, where q, k, v and the rotation are of this rank's tokens."""
        from .parallel.sequence import attend_over_ranks

        assert self.grid is not None and self.partition is not None and self.spread is not None
        q, k = attn.norm_q(q), attn.norm_k(k)
        if rotary_emb is not None:
            q, k = (apply_rotary(x.unflatten(2, (attn.heads, -1)), *rotary_emb).flatten(2) for x in (q, k))
        if isinstance(backend, str):
            lengths = self.partition.window_lengths(self.grid)
            backend, _ = choose(backend, Situation(q.device, q.dtype, q.shape[2] // attn.heads, windows=lengths))
        qkv = [x.contiguous() for x in (q, k, v)]
        window = Windows(self.grid, self.partition, backend)
        return attend_over_ranks(qkv, window, attn.heads, self.spread, self.share.heads)


def compile_blocks(transformer: WanTransformer3DModel, plan: Plan, **options) -> None:
    """`torch.compile` every block, one after the other, without graph breaks; `options` are torch.compile's.

    Shapes are compiled in as they are (`dynamic=False`): each distinct partition of the plan, and each new size of
    clip, is one compilation shared by the layers that have it. Compiled blocks run whole, not by chunks of tokens.
    """
    for block in _all_blocks(transformer):
        stand_in = getattr(vars(block).get("forward"), "__self__", None)
        if isinstance(stand_in, BlockByChunks):
            stand_in.remove()
        fuse_gelu(block)
        ours, theirs = block.attn1.processor, block.attn2.processor
        if isinstance(ours, T3AttentionProcessor) and type(theirs) is WanAttnProcessor:
            block.attn2.set_processor(TextProcessor(ours.backend))
    distinct = len({plan.layers[i % len(plan.layers)] for i in range(len(transformer.blocks))})
    config = torch._dynamo.config
    # One code object serves all blocks; the usual limit of 8 is less than a plan may have partitions.
    config.recompile_limit = max(config.recompile_limit, 4 * distinct)
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, **options)


def _through_diffusers(name) -> Backend:
    """The backend that `set_attention_backend` asked for: an explicit choice in diffusers' own terms is kept."""

    def attend(q, k, v, scale):
        return dispatch_attention_fn(q, k, v, scale=scale, backend=name)

    return Backend(f"diffusers {name}", "diffusers' own dispatch", attend)


@dataclass
class T3Installation:
    """T3 on one transformer; `remove()` gives the transformer its own processors and forwards back."""

    transformer: WanTransformer3DModel
    plan: Plan
    _former: list
    _blocks: list[BlockByChunks]
    _hook: torch.utils.hooks.RemovableHandle

    def remove(self) -> None:
        """Put the former processors and forwards back, as if T3 had never been installed."""
        self._hook.remove()
        for block in self._blocks:
            block.remove()
        for plain in _all_blocks(self.transformer):
            plain_gelu(plain)
            if type(plain.attn2.processor) is TextProcessor:
                plain.attn2.set_processor(WanAttnProcessor())
        for (attention, _), processor in zip(self_attentions(self.transformer), self._former, strict=True):
            attention.set_processor(processor)


def self_attentions(transformer: WanTransformer3DModel | WanVACETransformer3DModel) -> list[tuple[WanAttention, int]]:
    """Every self-attention over the video's tokens, and its layer of the plan.

    A VACE block has the layer of the block whose output it joins.
    """
    found = [(block.attn1, layer) for layer, block in enumerate(transformer.blocks)]
    if isinstance(transformer, WanVACETransformer3DModel):
        joins = zip(transformer.vace_blocks, transformer.config.vace_layers, strict=True)
        found += [(block.attn1, layer) for block, layer in joins]
    return found


def _all_blocks(transformer: WanTransformer3DModel | WanVACETransformer3DModel) -> list[Any]:
    return [*transformer.blocks, *(transformer.vace_blocks if hasattr(transformer, "vace_blocks") else ())]


def _windows(attention: WanAttention) -> tuple[Windows, Share, Spread | None] | None:
    """What this self-attention attends under T3, or None where it has another processor by now."""
    processor = attention.processor
    if not isinstance(processor, T3AttentionProcessor) or processor.grid is None or processor.partition is None:
        return None
    backend: str | Backend = processor.backend
    if processor._attention_backend is not None:
        backend = _through_diffusers(processor._attention_backend)
    if isinstance(backend, str):
        like = attention.to_out[0].weight
        dtype = attention.norm_q.weight.dtype if like.dtype.itemsize == 1 else like.dtype
        head_dim = attention.inner_dim // attention.heads
        windows = processor.partition.window_lengths(processor.grid)
        backend, _ = choose(backend, Situation(like.device, dtype, head_dim, windows=windows))
    return Windows(processor.grid, processor.partition, backend), processor.share, processor.spread


def install_t3(
    transformer: WanTransformer3DModel | WanVACETransformer3DModel,
    plan: Plan,
    *,
    backend: str | Backend = "auto",
    memory: str | int | None = AUTO,
    say: Callable[[str], None] = lambda text: None,
    spread: Spread | None = None,
) -> T3Installation:
    """Switch the self-attention of every block of `transformer` to T3 under `plan`, in place, and have blocks work by
    chunks of tokens where clips are large.

    The grid is read from the latents at each forward: any size works without installing again. Cross-attention attends
    all keys as ever, in blocks by chunks by what attends windows (see `text_attention.backend_for_text`), unless
    `set_attention_backend` says otherwise. backend: that of `t3.t3_attention`.
    memory: `"fast"`, `"lean"` or `"auto"` (see `memory.pick`), or bytes that attention may take beside a block's input
    and output: the fastest way within them is taken, or the leanest. None is `"fast"`.
    say: told, once, which way was taken and why, and what stands in the way of chunks.
    spread: the ranks that share the tokens of a video; see `parallel.spreading.Spreading`, to be made afterwards.
    """
    attentions = self_attentions(transformer)
    bound = memory if isinstance(memory, int) else None
    processors = [T3AttentionProcessor(backend, bound) for _ in attentions]
    former = [attention.processor for attention, _ in attentions]
    for (attention, _), processor in zip(attentions, processors, strict=True):
        processor.spread = spread
        attention.set_processor(processor)
    said: set[str] = set()

    def say_once(text: str, once: str | None = None) -> None:
        if (once or text) not in said:
            said.add(once or text)
            say(text)

    blocks = [BlockByChunks(block, _windows, say_once) for block in _all_blocks(transformer)]
    for block in blocks:
        block.install()

    def before_forward(module, args, kwargs):
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        grid = Grid(*(n // p for n, p in zip(latents.shape[2:], module.config.patch_size, strict=True)))
        share, why = _share(module, latents, grid.tokens, FAST if memory is None else memory, spread)
        if why and spread is not None:
            heads = module.config.num_attention_heads // spread.size
            at_once = spread.at_once(heads, share.heads)
            why += f" Of each of {spread.size} ranks: {at_once} of its {heads} heads at once."
        if why:
            say_once(f"memory     {why}", f"{latents.shape} {share}")
        for (_, layer), processor in zip(attentions, processors, strict=True):
            processor.grid, processor.partition, processor.share = grid, plan.partition(layer, grid), share

    hook = transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
    return T3Installation(transformer, plan, former, blocks, hook)


def _share(
    module: Any, latents: torch.Tensor, tokens: int, memory: str | int, spread: Spread | None
) -> tuple[Share, str]:
    """How blocks share out their work on these latents, and why, in words where it matters."""
    shape = ModelShape.from_config(module.config)
    if spread is not None:
        tokens, shape = max(spread.shares(tokens)), replace(shape, ranks=spread.size)
    ways = shares(shape.own_heads, parts=spread is None)
    size = {"batch": latents.shape[0], "element": latents.element_size()}

    block = shape.block(tokens, **size)

    def more(share: Share) -> int:
        return 0 if spread is None else spread.more_bytes(block.tensor, shape.own_heads, share.heads)

    def needed(share: Share) -> int:
        return activation_bytes(shape, tokens, **size, share=share) + more(share)

    if isinstance(memory, int):
        beside = 2 * block.tensor
        share = next((way for way in ways if block_bytes(block, way) + more(way) - beside <= memory), ways[-1])
        return share, f"{share}, for {memory / GIB:.3g} GiB of attention."
    free = free_bytes(latents.device)
    if free is None:
        return (ways[-1] if memory == LEAN else ways[0]), ""
    # With offload the weights are still to come.
    free -= sum(p.numel() * p.element_size() for p in module.parameters() if p.device != latents.device)
    return pick(memory, ways, needed, free)
