"""Every parameter of a Wan diffusion transformer: original name, diffusers name, shape.

The table below (and that of `layout_control`, for VACE and Fun) is the one place where DiT names are written down;
renaming, completeness checks and adapter targets are all read from it. Original names: Wan2.1/2.2
`wan/modules/model.py`; diffusers names: `WanTransformer3DModel`.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from .layout_control import CONFIG_KEYS, VACE_LINEARS, control_config, control_shapes, is_control_param


class Param(NamedTuple):
    """Where a parameter lives in the library's model, and its shape."""

    name: str
    shape: tuple[int, ...]


Layout = dict[str, Param]

# Inside `blocks.N.`: module -> module. Linear layers have weight and bias, RMS norms a weight only.
BLOCK_LINEARS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
BLOCK_RMS_NORMS = {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
BLOCK_LAYER_NORMS = {"norm3": "norm2"}  # the two code bases number the norms in a different order
BLOCK_BARE = {"modulation": "scale_shift_table"}
TOP_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
TOP_BARE = {"head.modulation": "scale_shift_table", "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
# In diffusers' image-to-video files, and used by nothing.
UNUSED_DIFFUSERS = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight$")
IMAGE_ONLY = ("img_emb.", ".k_img.", ".v_img.", ".norm_k_img.")

_BOTH, _WEIGHT = ("weight", "bias"), ("weight",)


def _named(modules: dict[str, str], leaves: tuple[str, ...]) -> dict[str, str]:
    return {f"{original}.{leaf}": f"{theirs}.{leaf}" for original, theirs in modules.items() for leaf in leaves}


BLOCK_PARAMS = {
    **_named(BLOCK_LINEARS, _BOTH),
    **_named(BLOCK_RMS_NORMS, _WEIGHT),
    **_named(BLOCK_LAYER_NORMS, _BOTH),
    **BLOCK_BARE,
}
VACE_PARAMS = _named(VACE_LINEARS, _BOTH)
TOP_PARAMS = {**_named(TOP_MODULES, _BOTH), **TOP_BARE}
_FORTH = {"blocks": BLOCK_PARAMS, "vace_blocks": {**BLOCK_PARAMS, **VACE_PARAMS}, "": TOP_PARAMS}
_BACK = {where: {theirs: original for original, theirs in names.items()} for where, names in _FORTH.items()}
_ANY_BLOCK = re.compile(r"(blocks|vace_blocks)\.(0|[1-9]\d*)\.(.+)$")
_BLOCK = re.compile(r"blocks\.(0|[1-9]\d*)\.(.+)$")


def _rename(key: str, tables: dict[str, dict[str, str]]) -> str | None:
    if match := _ANY_BLOCK.match(key):
        found = tables[match[1]].get(match[3])
        return None if found is None else f"{match[1]}.{match[2]}.{found}"
    return key if is_control_param(key) else tables[""].get(key)


def to_diffusers(key: str) -> str | None:
    """Diffusers name of an original parameter name, or None when it is no parameter of a Wan DiT."""
    return _rename(key, _FORTH)


def to_original(key: str) -> str | None:
    """Original name of a diffusers parameter name, or None when it is no parameter of a Wan DiT."""
    return _rename(key, _BACK)


def block_index(key: str) -> int | None:
    """The N of `blocks.N.`, or None outside of the blocks."""
    match = _BLOCK.match(key)
    return int(match[1]) if match else None


def _block_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, ffn = width(config), config["ffn_dim"]
    image = config.get("added_kv_proj_dim")
    shapes: dict[str, tuple[int, ...]] = {"modulation": (1, 6, dim)}
    for module in BLOCK_LINEARS:
        rows, columns = {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}.get(module, (dim, dim))
        if module.endswith("_img"):
            if image is None:
                continue
            columns = image
        shapes[f"{module}.weight"], shapes[f"{module}.bias"] = (rows, columns), (rows,)
    for module in BLOCK_RMS_NORMS:
        if image is not None or not module.endswith("_img"):
            shapes[f"{module}.weight"] = (dim,)
    if config.get("cross_attn_norm", True):
        shapes["norm3.weight"] = shapes["norm3.bias"] = (dim,)
    return shapes


def _top_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    dim, patch = width(config), tuple(config["patch_size"])
    text, freq, image = config["text_dim"], config["freq_dim"], config.get("image_dim")
    linears = {
        "text_embedding.0": (dim, text),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, freq),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (config["out_channels"] * math.prod(patch), dim),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config["in_channels"], *patch),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }
    if image is not None:
        linears["img_emb.proj.1"], linears["img_emb.proj.3"] = (image, image), (dim, image)
        for module, size in (("img_emb.proj.0", image), ("img_emb.proj.4", dim)):
            shapes[f"{module}.weight"] = shapes[f"{module}.bias"] = (size,)
        if config.get("pos_embed_seq_len") is not None:
            shapes["img_emb.emb_pos"] = (1, config["pos_embed_seq_len"], image)
    for module, (rows, columns) in linears.items():
        shapes[f"{module}.weight"], shapes[f"{module}.bias"] = (rows, columns), (rows,)
    return shapes


def has_control_parts(config: dict[str, Any]) -> bool:
    """Whether a config is that of a VACE, Fun-Control or Camera model."""
    return any(key in config for key in CONFIG_KEYS)


def width(config: dict[str, Any]) -> int:
    """Width of the token stream."""
    return config["num_attention_heads"] * config["attention_head_dim"]


def dit_layout(config: dict[str, Any]) -> Layout:
    """Original parameter name -> (diffusers name, shape), for a config that `dit_config` makes."""
    shapes = _top_shapes(config)
    block = _block_shapes(config)
    shapes.update(control_shapes(config, width(config), block))
    for index in range(config["num_layers"]):
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return {key: Param(str(to_diffusers(key)), shape) for key, shape in shapes.items()}


def dit_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `WanTransformer3DModel` config that fits these original-named shapes, taking heads as 128 wide.

    A model with control parts gets their `layout_control.CONFIG_KEYS` too, which that class does not know.
    Raises KeyError or IndexError when the tensors that carry the sizes are absent; ValueError when the width is no
    multiple of 128.
    """
    dim = shapes["head.modulation"][2]
    if dim % 128:
        raise ValueError(f"width {dim} is no multiple of the head size 128")
    patch = shapes["patch_embedding.weight"][2:]
    image = shapes["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in shapes else None
    added = shapes.get("blocks.0.cross_attn.k_img.weight")
    positions = shapes.get("img_emb.emb_pos")
    layers = 1 + max(index for key in shapes if (index := block_index(key)) is not None)
    return {
        **control_config(shapes, layers),
        "patch_size": list(patch),
        "num_attention_heads": dim // 128,
        "attention_head_dim": 128,
        "in_channels": shapes["patch_embedding.weight"][1],
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": layers,
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image,
        "added_kv_proj_dim": added[1] if added else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": positions[1] if positions else None,
    }
