"""What a forward pass costs before it is run: multiply-accumulates and activation memory. Pure Python, no torch.

One MAC is one multiplication and one addition (two FLOPs). Attention counts both of its matrix products; softmax,
norms and rotations are left out, being linear in the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .memory import BlockShape, Share, block_bytes, joined_bytes
from .plan import Grid, Partition, Plan

FASTEST = Share()
# A saving below this part of a forward pass is next to nothing: grouping and merging take time that MACs do not show.
LITTLE = 0.1


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Wan transformer that its cost depends on.

    `control_layers`: for VACE, the layers that its further blocks join, each a block like the others;
    `control_channels`: those of what they are given. `ranks`: those that share out the heads; memory is one rank's.
    """

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_tokens: int = 512
    image_tokens: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    control_layers: tuple[int, ...] = ()
    control_channels: int = 0
    ranks: int = 1

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    @property
    def own_heads(self) -> int:
        """How many heads one rank attends."""
        return max(1, self.heads // self.ranks)

    @classmethod
    def from_config(cls, config: Mapping) -> ModelShape:
        """From a diffusers `WanTransformer3DModel` or `WanVACETransformer3DModel` config."""
        return cls(
            layers=config["num_layers"],
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            heads=config["num_attention_heads"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            text_dim=config["text_dim"],
            image_tokens=(config.get("pos_embed_seq_len") or 257) if config.get("image_dim") else 0,
            patch=tuple(config["patch_size"]),
            control_layers=tuple(config.get("vace_layers") or ()),
            control_channels=config.get("vace_in_channels") or 0,
        )

    def block(self, tokens: int, *, batch: int = 1, element: int = 2, beside: int = 0) -> BlockShape:
        """What the memory of one block depends on; `beside`: those of the tokens that stand beside the grid.

        Of several ranks, one's: its own tokens of all heads weigh as much as all tokens of its heads.
        """
        return BlockShape(self.dim, self.ffn_dim, self.own_heads, batch, tokens, element, beside)


def short(number: float) -> str:
    """For people: a positive number with three digits, or with all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def macs_text(macs: int) -> str:
    """For people: MACs in units of 10^12 (T), or of 10^9 (G) where that is less than one."""
    return f"{short(macs / 1e12)} T" if macs >= 1e12 else f"{short(macs / 1e9)} G"


def branch_pairs(grid: Grid, partition: Partition, global_tokens: int = 0) -> int:
    """Query-key pairs of one grouping's windows; global tokens are keys of every window."""
    return sum(n * size * (size + global_tokens) for n, size in partition.window_classes(grid))


def attention_pairs(grid: Grid, partition: Partition, global_tokens: int = 0, *, released: bool = False) -> int:
    """Query-key pairs of one T3 layer: both groupings, coinciding ones once unless `released`, plus global queries.

    `global_tokens` are those before and after the grid; each of them attends every token, once.
    `released` counts both groupings always, as the authors' code computes them.
    """
    branches = 1 if partition.coincides(grid) and not released else 2
    global_pairs = global_tokens * (grid.tokens + global_tokens)
    return branches * branch_pairs(grid, partition, global_tokens) + global_pairs


def saving_warning(dense: int, t3: int) -> str | None:
    """In words, that T3 makes more work than full attention, or saves next to nothing; None where it pays.

    dense, t3: MACs of a forward pass of the whole model, tokens beside the grid counted.
    """
    if t3 > dense:
        found = f"T3 makes {t3 / dense - 1:.1%} more work a forward pass than full attention"
    elif (saved := 1 - t3 / dense) < LITTLE:
        found = f"T3 saves only {saved:.1%} of the work of a forward pass, less than its grouping may cost"
    else:
        return None
    return f"{found} on this clip: it pays for larger or longer ones. Plan dense is full attention."


@dataclass(frozen=True)
class Cost:
    """MACs of one forward pass of one sample, and bytes of activations at its peak.

    `attention_*`: self-attention's two products. `other`: everything else (projections, cross-attention, FFN,
    embeddings), which no plan changes. `model_*`: their sums.
    """

    attention_dense: int
    attention_released: int
    attention_t3: int
    other: int
    activation_bytes: int

    @property
    def model_dense(self) -> int:
        return self.attention_dense + self.other

    @property
    def model_released(self) -> int:
        return self.attention_released + self.other

    @property
    def model_t3(self) -> int:
        return self.attention_t3 + self.other


def other_macs(shape: ModelShape, tokens: int) -> int:
    """MACs of one forward pass outside self-attention's products, for `tokens` tokens."""
    d, context = shape.dim, shape.text_tokens + shape.image_tokens
    pt, ph, pw = shape.patch
    patch_volume = pt * ph * pw
    per_layer = (
        4 * tokens * d * d  # self-attention's q, k, v and output projections
        + 2 * tokens * d * d  # cross-attention's q and output projections
        + 2 * context * d * d  # its k and v
        + 2 * tokens * context * d  # its two products
        + 2 * tokens * d * shape.ffn_dim
    )
    text = shape.text_tokens * (shape.text_dim * d + d * d)
    ends = tokens * patch_volume * d * (shape.in_channels + shape.out_channels + shape.control_channels)
    control = len(shape.control_layers)
    joints = tokens * d * d * (control + 1) if control else 0  # a projection into the first block, one out of each
    return (shape.layers + control) * per_layer + joints + text + ends


def activation_bytes(
    shape: ModelShape, tokens: int, *, batch: int = 1, element: int = 2, share: Share | None = FASTEST, beside: int = 0
) -> int:
    """Peak activation bytes of one forward pass of the diffusers model with T3 attention, weights not counted.

    `element` is the bytes of one activation (2 for bfloat16). share: how blocks share out their work; None: they run
    whole, as when compiled. beside: those of the tokens that stand beside the grid.
    Counted from the model's code: a block, see `memory.block_bytes`; or the model's end, where the last block's output
    lies beside two float32 tensors of its size. Whole blocks hold the FFN's inner tensor twice, beside the residual
    stream, its float32 copy and the normed input; or, where the FFN is narrow, ten tensors in attention. The float32
    cosines and sines of RoPE live throughout, as does what each control block adds to the layer it joins. A few per
    cent less than measured (`benchmarks/README.md`).
    """
    wide, narrow = tokens * shape.ffn_dim * element, tokens * shape.dim * element
    float_copy = tokens * shape.dim * 4
    end = batch * (narrow + 2 * float_copy)
    if share is None:
        joined = joined_bytes(batch * narrow) if beside else 0
        block = max(batch * (2 * wide + 2 * narrow + float_copy), batch * (10 * narrow + float_copy) + joined)
    else:
        block = block_bytes(shape.block(tokens, batch=batch, element=element, beside=beside), share)
    control = (len(shape.control_layers) + 1) * narrow if shape.control_layers else 0
    turns = 2 * tokens * shape.head_dim * 4
    return turns + batch * control + max(block, end)


def model_cost(
    shape: ModelShape,
    plan: Plan,
    grid: Sequence[int],
    *,
    global_tokens: int = 0,
    batch: int = 1,
    element: int = 2,
    share: Share | None = FASTEST,
) -> Cost:
    """The cost of one forward pass under `plan`, dense, as released and as computed here.

    MACs are those of one sample; `activation_bytes` those of `batch` samples, worked off as `share` says.
    `global_tokens`: tokens before and after the grid (reference or context latents), counted in every figure.
    """
    here = Grid(*grid)
    layers = plan.partitions(here, shape.layers)
    partitions = [*layers, *(layers[i] for i in shape.control_layers)]
    tokens = here.tokens + global_tokens
    products = 2 * shape.dim

    def attention(released: bool) -> int:
        return products * sum(attention_pairs(here, p, global_tokens, released=released) for p in partitions)

    return Cost(
        attention_dense=products * len(partitions) * tokens * tokens,
        attention_released=attention(True),
        attention_t3=attention(False),
        other=other_macs(shape, tokens),
        activation_bytes=activation_bytes(
            shape, tokens, batch=batch, element=element, share=share, beside=global_tokens
        ),
    )
