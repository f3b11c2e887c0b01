"""What a `config.json` beside the weights adds to what their shapes say, where it belongs to them at all.

Folders of single files hold models of many kinds and at most one config.json, and heads taken from another model's
change what is computed without any error. So one that contradicts the shapes anywhere is left aside as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .dialects import DIT, VAE

if TYPE_CHECKING:
    from .files import WeightFile

# It counts only if diffusers wrote it for the class we build.
_CLASSES = {DIT: ("WanTransformer3DModel", "WanVACETransformer3DModel"), VAE: ("AutoencoderKLWan",)}
_HEAD_DIM = 128  # diffusers' default, for configs that leave it out
# What both a config.json and the shapes say.
_SIZES = {
    DIT: (
        *("patch_size", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim", "num_layers"),
        *("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "vace_in_channels"),
    ),
    VAE: ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "in_channels", "out_channels"),
}


def config_beside(
    file: WeightFile, component: str, sizes: dict[str, Any], width: int | None = None
) -> tuple[dict[str, Any], str | None]:
    """The config.json that belongs to the weights, or an empty dict; and a note where there is one of another model.

    Args:
        component: "dit" or "vae".
        sizes: the config that the shapes ask for.
        width: of the token stream, as the shapes show it.

    Raises:
        T3Error: there is one that cannot be read.
    """
    beside = file.sibling_config()
    # VideoX-Fun's class has the name of diffusers' and fields of its own, `dim` among them.
    if beside.get("_class_name") not in _CLASSES[component] or "dim" in beside:
        return {}, None
    odd = [
        f"{key} {beside[key]} where the tensors have {sizes.get(key)}"
        for key in _SIZES[component]
        if beside.get(key) is not None and beside[key] != sizes.get(key)
    ]
    heads, each = beside.get("num_attention_heads"), beside.get("attention_head_dim", _HEAD_DIM)
    if component == DIT and heads is not None and width is not None and _product(heads, each) != width:
        odd.insert(0, f"{heads} heads of {each} where the tensors are {width} wide")
    if not odd:
        return beside, None
    return {}, f"the config.json beside it is of another model and was left aside: {', '.join(odd[:3])}"


def _product(heads: Any, each: Any) -> int | None:
    return heads * each if isinstance(heads, int) and isinstance(each, int) else None
