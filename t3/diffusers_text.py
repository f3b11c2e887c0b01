"""Cross-attention of a diffusers Wan block by chunks of tokens, by a backend of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, _get_added_kv_projections

from .backends import Backend, Situation, choose
from .text_attention import say_nothing, serve_text

# diffusers counts the text's tokens from the end; those of an image stand before them.
TEXT_TOKENS = 512


class TextAttention:
    """What `WanAttnProcessor` computes of some tokens against `text` `[B, m, dim]`; its keys are made once, here."""

    def __init__(self, attn: Any, text: torch.Tensor, backend: Backend, say: Callable[[str], None]) -> None:
        self.attn, self.backend, self.say = attn, backend, say
        self.images: tuple[torch.Tensor, torch.Tensor] | None = None
        if attn.add_k_proj is not None:
            image, text = text[:, : text.shape[1] - TEXT_TOKENS], text[:, text.shape[1] - TEXT_TOKENS :]
            k, v = _get_added_kv_projections(attn, image)
            self.images = attn.norm_added_k(k), v
        k, v = attn.to_kv(text).chunk(2, dim=-1) if attn.fused_projections else (attn.to_k(text), attn.to_v(text))
        self.texts = attn.norm_k(k), v

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[B, n, dim]`; returns the same shape, after the output projection."""
        attn = self.attn
        q = attn.norm_q(attn.to_q(x))
        out = self._attend(q, *self.texts)
        if self.images is not None:
            out = out + self._attend(q, *self.images)
        return attn.to_out[1](attn.to_out[0](out))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return serve_text(q, k, v, self.attn.heads, self.backend, self.say)


class TextProcessor(WanAttnProcessor):
    """Stands where diffusers' processor of cross-attention stood, in blocks that are compiled.

    backend: that of self-attention. With gradients, or where `set_attention_backend` asks for another, diffusers' own
    attention does the work.
    """

    def __init__(self, backend: str | Backend) -> None:
        super().__init__()
        self.backend = backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if torch.is_grad_enabled() or self._attention_backend is not None or self._parallel_config is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        backend = self.backend
        if isinstance(backend, str):
            x, keys = hidden_states, encoder_hidden_states.shape[1]
            backend, _ = choose(backend, Situation(x.device, x.dtype, attn.inner_dim // attn.heads, windows=(keys,)))
        return TextAttention(attn, encoder_hidden_states, backend, say_nothing)(hidden_states)
