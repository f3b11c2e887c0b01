"""Words to embeddings: a tokenizer of whole words and a small UMT5 encoder, in the formats the Wan pipeline takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .captions import words

TEXT_DIM = 128
TOKENS = 512  # what Wan's pipeline pads embeddings to, with zeros; the training loop does the same
ENCODER = {
    "d_model": TEXT_DIM,
    "d_kv": 64,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
}
SPECIAL = ("<pad>", "</s>", "<unk>")
# What people also say. The tokenizer replaces it, so that the encoder knows one word for one thing.
SYNONYMS = {
    "grey": "gray",
    "big": "large",
    "huge": "large",
    "tiny": "small",
    "little": "small",
    "violet|magenta": "purple",
    "rotating|spinning": "turning",
    "moves|going|goes": "moving",
    "upwards?": "up",
    "downwards?": "down",
    "leftwards?": "left",
    "rightwards?": "right",
    "to the ": "",
    "an|the": "a",
    "disc|ball": "circle",
    "discs|balls": "circles",
    "box": "square",
    "boxes": "squares",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words in lower case, of the kind Wan takes: padded, ends in `</s>`; others are `<unk>`."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    # A word boundary only where the pattern ends in a letter.
    patterns = [(rf"\b(?:{old})" + ("" if old.endswith(" ") else r"\b"), new) for old, new in SYNONYMS.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *(normalizers.Replace(Regex(old), new) for old, new in patterns)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def make_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """The encoder with random weights."""
    return UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **ENCODER))


class TextModel:
    """Tokenizer and encoder from a folder with `tokenizer` and `text_encoder` in it."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.encoder = (
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True).to(device).eval()
        )

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """One `[tokens, 128]` for each caption, `</s>` included and no padding, float32: what the pipeline computes."""
        batch = self.tokenizer(list(captions), padding=True, return_tensors="pt").to(self.encoder.device)
        states = self.encoder(batch.input_ids, batch.attention_mask).last_hidden_state
        return [state[: int(mask.sum())] for state, mask in zip(states, batch.attention_mask, strict=True)]
