"""The attention of the model in training: T3 under a plan, on its way there, or dense, switched between forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections

from ..backends import Backend
from ..errors import T3Error
from ..plan import Grid, Layer, Partition, Plan
from ..processor import self_attentions
from .attention import training_attention


@dataclass
class Operator:
    """What the self-attention of every block computes at the next forward. Change it between forwards only.

    windows: how far window counts are from one (0, dense) to the plan's (1). mean: as in `training_attention`, None
    for the mean alone. dense: full attention whatever the rest says. backend: the name of one, or one: compiled code
    cannot look for the fastest. layers: that of each processor; a VACE block has the one of the block it joins.
    """

    plan: Plan
    branches: str = "both"
    backend: str | Backend = "auto"
    windows: float = 1.0
    mean: torch.Tensor | None = None
    dense: bool = False
    processors: list[TrainingProcessor] = field(default_factory=list, repr=False)
    layers: list[int] = field(default_factory=list, repr=False)

    def partition(self, layer: int, grid: Grid) -> Partition:
        """The window counts of a layer now."""
        if self.dense:
            return Partition(1, 1, 1)
        return grown(self.plan.partition(layer, grid), self.windows)

    def place(self, grid: Grid) -> None:
        """Tell every block's attention its grid and its window counts."""
        for layer, processor in zip(self.layers, self.processors, strict=True):
            processor.grid, processor.partition = tuple(grid), tuple(self.partition(layer, grid))
            processor.mean = None if self.dense else self.mean
            processor.branches = self.branches


def grown(partition: Partition, windows: float) -> Partition:
    """Window counts on their way from one (`windows` 0) to `partition` (1): each to that power, rounded."""
    if windows >= 1:
        return partition
    return Partition(*(max(1, round(count**windows)) for count in partition))


class TrainingProcessor:
    """Self-attention of one block in training; stands where diffusers' `WanAttnProcessor` stood.

    Norms and rotation are those of that processor, without its writes into a buffer, which gradients dislike.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, branches: str, backend: str | Backend) -> None:
        self.branches, self.backend = branches, backend
        self.grid: tuple[int, ...] = ()
        self.partition: tuple[int, ...] = ()
        self.mean: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in projected(attn, hidden_states, hidden_states, rotary_emb))
        out = training_attention(
            q, k, v, self.grid, self.partition, branches=self.branches, mean=self.mean, backend=self.backend
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))


def projected(attn, queries, keys, rotary_emb, rows=None):
    """q of `queries` `[B, M, D]`, k and v of `keys` `[B, N, D]`, normed and rotated, all in v's dtype.

    rows: where the queries stand among the tokens, if they are not all of them.
    """
    if queries is keys:
        q, k, v = _get_qkv_projections(attn, queries, None)
    else:
        q, k, v = attn.to_q(queries), attn.to_k(keys), attn.to_v(keys)
    q, k = attn.norm_q(q), attn.norm_k(k)
    if rotary_emb is not None:
        cos, sin = (table[:, :, 0, part::2] for part, table in enumerate(rotary_emb))
        k = _turned(k, attn.heads, cos, sin)
        q = _turned(q, attn.heads, *((cos, sin) if rows is None else (cos[:, rows], sin[:, rows])))
    return q.to(v.dtype), k.to(v.dtype), v


def _turned(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring channels. x: `[B, N, heads*head_dim]`; cos, sin: `[1, N, head_dim/2]` float."""
    even, odd = x.unflatten(2, (heads, -1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(2)


class _Norm(torch.nn.RMSNorm):
    """An RMS norm in the dtype of its input, as the finished model computes it.

    torch has one kernel for that; for a float32 weight beside bfloat16 input it takes one for every operation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def install(transformer: WanTransformer3DModel | WanVACETransformer3DModel, operator: Operator) -> None:
    """Let `operator` decide the self-attention of every block of `transformer`, VACE blocks too, in place."""
    attentions = self_attentions(transformer)
    operator.layers = [layer for _, layer in attentions]
    operator.processors = [TrainingProcessor(operator.branches, operator.backend) for _ in attentions]
    for (attention, _), processor in zip(attentions, operator.processors, strict=True):
        attention.set_processor(processor)
    for module in transformer.modules():
        if isinstance(module, WanAttention):
            # The parameters stay where they are and under their names.
            for norm in (module.norm_q, module.norm_k, getattr(module, "norm_added_k", None)):
                if norm is not None:
                    norm.__class__ = _Norm
    patch = transformer.config.patch_size

    def before_forward(module, args, kwargs):
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        operator.place(Grid(*(n // p for n, p in zip(latents.shape[2:], patch, strict=True))))

    transformer.register_forward_pre_hook(before_forward, with_kwargs=True)


def with_dense_layers(plan: Plan, dense: Sequence[int], layers: int) -> Plan:
    """`plan` with these layers of a model of `layers` left dense: a plan that states every layer.

    Raises `T3Error` for a layer that the model does not have.
    """
    if not dense:
        return plan
    if beyond := next((number for number in dense if not 0 <= number < layers), None):
        raise T3Error(
            f"[model] dense_layers has {beyond}; this model has layers 0 to {layers - 1}. Nearest: {layers - 1}."
        )
    stated = [plan.layers[i % len(plan.layers)] for i in range(layers)]
    for number in dense:
        stated[number] = Layer(1, 1, 1)
    return Plan(f"{plan.name}, dense {','.join(map(str, sorted(set(dense))))}", plan.grid, tuple(stated))
