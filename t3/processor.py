"""T3 attention inside a diffusers `WanTransformer3DModel`: one attention processor per block, one hook for the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, _get_qkv_projections

from .attention import t3_attention
from .backends import Backend
from .fused import attention_from_projections, norm_weight, refusal
from .plan import Grid, Partition, Plan


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
        self.grid: Grid | None = None
        self.partition: Partition | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        backend = self.backend if self._attention_backend is None else _through_diffusers(self._attention_backend)
        assert self.grid is not None and self.partition is not None, "the hook of install_t3 has not run"
        if refusal(q, k, v, memory=self.memory) is None:
            out = attention_from_projections(
                q,
                k,
                v,
                self.grid,
                self.partition,
                heads=attn.heads,
                norms=(norm_weight(attn.norm_q, q), norm_weight(attn.norm_k, k)),
                eps=attn.norm_q.eps,
                turns=None if rotary_emb is None else _turns(*rotary_emb),
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


def _turns(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each pair of channels. diffusers' tables, `[1, N, 1, head_dim]`, have each of them twice."""
    return cos[:, :, 0, 0::2], sin[:, :, 0, 1::2]


def compile_blocks(transformer: WanTransformer3DModel, plan: Plan, **options) -> None:
    """`torch.compile` every block, one after the other, without graph breaks; `options` are torch.compile's.

    Shapes are compiled in as they are (`dynamic=False`): each distinct partition of the plan, and each new size of
    clip, is one compilation shared by the layers that have it.
    """
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
    """T3 on one transformer; `remove()` gives the transformer its own processors back."""

    transformer: WanTransformer3DModel
    plan: Plan
    _former: list
    _hook: torch.utils.hooks.RemovableHandle

    def remove(self) -> None:
        """Put the former processors back, as if T3 had never been installed."""
        self._hook.remove()
        for block, processor in zip(self.transformer.blocks, self._former, strict=True):
            block.attn1.set_processor(processor)


def install_t3(
    transformer: WanTransformer3DModel,
    plan: Plan,
    *,
    backend: str | Backend = "auto",
    memory: int | None = None,
) -> T3Installation:
    """Switch the self-attention of every block of `transformer` to T3 under `plan`, in place.

    The grid is read from the latents at each forward: any size works without installing again.
    `backend` and `memory` are those of `t3.t3_attention`. Cross-attention is left alone.
    """
    processors = [T3AttentionProcessor(backend, memory) for _ in transformer.blocks]
    former = [block.attn1.processor for block in transformer.blocks]
    for block, processor in zip(transformer.blocks, processors, strict=True):
        block.attn1.set_processor(processor)

    def before_forward(module, args, kwargs):
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        grid = Grid(*(n // p for n, p in zip(latents.shape[2:], module.config.patch_size, strict=True)))
        for layer, processor in enumerate(processors):
            processor.grid, processor.partition = grid, plan.partition(layer, grid)

    hook = transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
    return T3Installation(transformer, plan, former, hook)
