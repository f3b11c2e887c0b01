"""Every parameter of the umT5 text encoder: Wan's original name, transformers name, shape.

Original names: Wan2.1 `wan/modules/t5.py` (encoder only); library names: transformers' `UMT5EncoderModel`, which
ComfyUI's files use too. umT5 has a position table in every layer, where T5 has one for all.
"""

from __future__ import annotations

import re
from typing import Any

from .layout_dit import Layout, Param

BLOCK_NAMES = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
TOP_NAMES = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
# The same table under a second name, the tokenizer inside ComfyUI's file, and the half of umT5 that Wan does not use.
UNUSED_HUGGINGFACE = re.compile(
    r"(encoder\.embed_tokens\.weight|spiece_model|lm_head\.weight|decoder\..+|logit_scale)$"
)
_BLOCK_BACK = {theirs: original for original, theirs in BLOCK_NAMES.items()}
_TOP_BACK = {theirs: original for original, theirs in TOP_NAMES.items()}


def to_huggingface(key: str) -> str | None:
    """transformers name of an original umT5 name, or None."""
    if match := re.match(r"blocks\.(\d+)\.(.+)$", key):
        found = BLOCK_NAMES.get(match[2])
        return None if found is None else f"encoder.block.{match[1]}.{found}"
    return TOP_NAMES.get(key)


def to_original(key: str) -> str | None:
    """Original name of a transformers umT5 encoder name, or None."""
    if match := re.match(r"encoder\.block\.(\d+)\.(.+)$", key):
        found = _BLOCK_BACK.get(match[2])
        return None if found is None else f"blocks.{match[1]}.{found}"
    return _TOP_BACK.get(key)


def text_layout(config: dict[str, Any]) -> Layout:
    """Original parameter name -> (transformers name, shape), for a `UMT5Config`."""
    dim, ffn, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]
    block = {
        "norm1.weight": (dim,),
        "attn.q.weight": (inner, dim),
        "attn.k.weight": (inner, dim),
        "attn.v.weight": (inner, dim),
        "attn.o.weight": (dim, inner),
        "pos_embedding.embedding.weight": (config["relative_attention_num_buckets"], heads),
        "norm2.weight": (dim,),
        "ffn.gate.0.weight": (ffn, dim),
        "ffn.fc1.weight": (ffn, dim),
        "ffn.fc2.weight": (dim, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (config["vocab_size"], dim), "norm.weight": (dim,)}
    for index in range(config["num_layers"]):
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return {key: Param(str(to_huggingface(key)), shape) for key, shape in shapes.items()}


def text_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `UMT5Config` fields that fit these original-named shapes. Raises KeyError when they are no umT5 encoder."""
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "vocab_size": vocab,
        "d_model": dim,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_heads": heads,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }
