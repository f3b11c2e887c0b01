"""Build the library's models from files in any dialect, with our own configs and no network.

The models equal `from_pretrained(torch_dtype=...)`: parameters in `dtype`, except those the library keeps in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import T3Error
from .dialects import DIT, TEXT, VAE
from .files import WeightFile, open_weights
from .identity import Identity, require
from .models import identify, layout_of
from .tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel


def _open(path: str | Path, component: str, option: str) -> tuple[WeightFile, Identity]:
    """Open and recognise; refuse the wrong kind before any tensor is read."""
    file = open_weights(path)
    found = identify(file)
    try:
        require(found, component, option)
    except T3Error as error:
        text = str(error)
        raise T3Error(text if str(file.path) in text else f"{file.path}: {text}") from None
    return file, found


def _state(file: WeightFile, found: Identity, dtype: torch.dtype, float32_parts: list[str]) -> dict[str, torch.Tensor]:
    """The library's state dict, each tensor read once and cast as the library's own loader casts it."""
    import torch

    assert found.config is not None
    state = {}
    for canonical, param in layout_of(found.component, found.config).items():
        kept = any(part in param.name.split(".") for part in float32_parts)
        tensor = file.read(found.names[canonical])
        state[param.name] = tensor.to(torch.float32 if kept else dtype).contiguous()
    return state


def _without_weights(build: Any) -> Any:
    """Call `build` with parameters on the meta device and buffers real.

    Rotary tables are buffers that no file holds: made on the meta device they would stay without values.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build()


def transformer_class(config: Mapping[str, Any]) -> type[WanTransformer3DModel] | type[WanVACETransformer3DModel]:
    """The library's class for a transformer of this config."""
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    return WanVACETransformer3DModel if "vace_layers" in config else WanTransformer3DModel


def load_transformer(path: str | Path, *, dtype: torch.dtype) -> WanTransformer3DModel | WanVACETransformer3DModel:
    """Load a Wan transformer, plain or VACE, from original or diffusers names; eval mode, on the CPU.

    Args:
        path: a .safetensors file, an index, or a folder.
        dtype: of the parameters; time embedding, modulation tables and norms stay float32 as diffusers keeps them.

    Raises:
        T3Error: not a whole Wan transformer of a kind that the library has a class for.
    """
    file, found = _open(path, DIT, "--dit")
    assert found.config is not None
    cls, config = transformer_class(found.config), found.config
    model = _without_weights(lambda: cls.from_config(config))
    model.load_state_dict(_state(file, found, dtype, model._keep_in_fp32_modules or []), strict=True, assign=True)
    return model.eval()


def load_vae(path: str | Path, *, dtype: torch.dtype) -> AutoencoderKLWan:
    """Load a Wan VAE, 2.1 or 2.2, from original or diffusers names; eval mode, on the CPU.

    Raises T3Error when the file is not a whole Wan VAE.
    """
    file, found = _open(path, VAE, "--vae")
    from diffusers import AutoencoderKLWan

    model = _without_weights(lambda: AutoencoderKLWan.from_config(found.config))
    model.load_state_dict(_state(file, found, dtype, model._keep_in_fp32_modules or []), strict=True, assign=True)
    return model.eval()


def load_text_encoder(
    path: str | Path, *, dtype: torch.dtype, tokenizer: str | Path | None = None
) -> tuple[UMT5EncoderModel, PreTrainedTokenizerFast]:
    """Load Wan's umT5 text encoder from original or transformers (ComfyUI) names, and its tokenizer.

    Args:
        path: a .safetensors file, an index, or a folder.
        dtype: of the parameters; in float16 the feed-forward output stays float32, as transformers keeps it.
        tokenizer: `tokenizer.json`, `spiece.model`, or a folder with one of them. When None: beside the weights, or
            the `spiece_model` that ComfyUI's files embed.

    Raises:
        T3Error: not a whole umT5 encoder, or no tokenizer anywhere.
    """
    file, found = _open(path, TEXT, "--text-encoder")
    assert found.config is not None
    tokens = load_tokenizer(file, tokenizer, vocabulary=found.config["vocab_size"])
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**found.config)
    model = _without_weights(lambda: UMT5EncoderModel(config))
    float32_parts = list(model._keep_in_fp32_modules or []) if dtype == torch.float16 else []
    state = _state(file, found, dtype, float32_parts)
    # transformers holds the token table under two names.
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.eval(), tokens
