"""Small random models of every kind the headless engine runs, as diffusers folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from t3.weights import known_config

# The width of one attention head is Wan's (128); everything else is as small as still exercises every part.
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_dim": 512,
    "num_layers": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 256,
    "patch_size": (1, 2, 2),
    "rope_max_seq_len": 1024,
}
TEXT_ENCODER = {
    "d_model": 128,
    "d_kv": 64,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 56}


def _transformer(seed: int, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    cls = WanVACETransformer3DModel if "vace_layers" in changes else WanTransformer3DModel
    return cls(**{**TRANSFORMER, **changes}).eval()


def _vae(name: str) -> AutoencoderKLWan:
    torch.manual_seed(5)
    config = {key: value for key, value in known_config(name).items() if not key.startswith("_")}
    narrow = {"base_dim": 8, "decoder_base_dim": 8 if config["decoder_base_dim"] else None}
    return AutoencoderKLWan(**{**config, **narrow}).eval()


def build(kind: str, folder: Path) -> Path:
    """Write a model of `kind` to `folder`, in diffusers' layout: t2v, i2v, vace, these as a14b-, or ti2v-5b."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(6)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER)).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "vae": _vae("wan2.2-vae" if kind == "ti2v-5b" else "wan2.1-vae"),
    }
    changes = {}
    if kind == "ti2v-5b":
        changes = {"in_channels": 48, "out_channels": 48}
        parts["expand_timesteps"] = True
    if kind.endswith("i2v"):
        changes = {"in_channels": 36}
    if kind == "i2v":
        changes.update(image_dim=CLIP["hidden_size"], added_kv_proj_dim=256)
        parts["image_encoder"] = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
        parts["image_processor"] = CLIPImageProcessor()
    if kind.endswith("vace"):
        changes = {"num_layers": 4, "vace_layers": [0, 2]}
    if kind.startswith("a14b"):
        parts.update(transformer_2=_transformer(8, **changes), boundary_ratio=0.875)
    parts["transformer"] = _transformer(7, **changes)
    pipeline = {"i2v": WanImageToVideoPipeline, "vace": WanVACEPipeline}.get(kind.rpartition("-")[2], WanPipeline)
    pipeline(**parts).save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind Wan's text encoder takes (padded, ends in `</s>`), whose words are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_like_embedded(folder: Path) -> Path:
    """Write a model like the embedded one to `folder`: its VAE and text encoder, shapes and a plan; the transformer's
    weights are random."""
    from t3.retrofit.output import write_full
    from tools.small_model.export import pack
    from tools.small_model.files import TRAINED
    from tools.small_model.init_dit import make_transformer
    from tools.small_model.plans import GRID, PLANS

    transformer = make_transformer(1)
    torch.manual_seed(1)
    torch.nn.init.xavier_uniform_(transformer.proj_out.weight)
    folder.mkdir(parents=True)
    tuned = folder / "tuned.safetensors"
    write_full(tuned, transformer.state_dict(), dict(transformer.config), PLANS["small-frame"], GRID, "float16")
    pack(TRAINED / "folded", TRAINED / "text", tuned, folder)
    tuned.unlink()
    return folder
