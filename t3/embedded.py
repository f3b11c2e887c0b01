"""The pipeline that needs no download: a small Wan built from a fixed seed, in the real file formats.

Its weights are random. It shows that everything runs, from prompt to file; its picture is texture.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from . import __version__
from .cache import cache_folder

SEED = 20_251_213
NOTICE = (
    "No model was named: this is the embedded test model. Its weights are random, so the picture is texture, not your "
    "prompt. Name a real one with --model or --dit."
)
# The width of one attention head is Wan's (128); everything else is as small as still exercises every part.
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_dim": 512,
    "num_layers": 10,
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
VAE = {"base_dim": 8, "z_dim": 16}
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def embedded_folder() -> Path:
    """The folder of the embedded model, whether it has been built or not."""
    return cache_folder() / f"embedded-{__version__}"


def ensure_embedded() -> Path:
    """The embedded model as a diffusers folder; built on first use, in seconds, 20 MB. Same weights everywhere."""
    folder = embedded_folder()
    if (folder / "model_index.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _build(draft)
        try:
            os.replace(draft, folder)
        except OSError:
            # Another process was first: its folder is the same.
            if not (folder / "model_index.json").exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **TEXT_ENCODER))
        transformer = WanTransformer3DModel(**TRANSFORMER)
        vae = AutoencoderKLWan(**VAE)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer.eval(),
    )
    pipe.save_pretrained(folder)


def byte_tokenizer():
    """A tokenizer of the kind Wan's text encoder takes (padded, ends in `</s>`), whose words are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

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
