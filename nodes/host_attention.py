"""ComfyUI's own attention as a backend, for users who chose one by a node or a launch flag."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..t3.backends import BACKENDS, Backend, installed
from ..t3.text_attention import serve_text

_FLAGS = (
    "use_sage_attention",
    "use_flash_attention",
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
    "force_upcast_attention",
)
_OVERRIDE = "optimized_attention_override"
# "sage" as a word or the beginning of one: not that of "usage".
_SAGE = re.compile("(?<![A-Za-z])sage|Sage|SAGE")
# What the host's attention may be told that changes nothing in plain attention over all keys.
_PLAIN = {"transformer_options", "_inside_attn_wrapper"}


def chosen_by_user(options: Mapping[str, Any]) -> str | None:
    """How the user chose an attention of their own, in words, or None where nobody did.

    `options`: the host's `transformer_options`.
    """
    from comfy.cli_args import args

    if _OVERRIDE in options:
        return "another node's attention override"
    chosen = [flag for flag in _FLAGS if getattr(args, flag, False)]
    return f"the launch flag --{chosen[0].replace('_', '-')}" if chosen else None


def is_sage(options: Mapping[str, Any]) -> bool | None:
    """Whether the attention that the user chose is sageattention; None for an override whose names do not say so."""
    from comfy.cli_args import args

    if _OVERRIDE not in options:
        return args.use_sage_attention
    override = options[_OVERRIDE]
    override = getattr(override, "func", override)  # of functools.partial
    names = (getattr(of, name, "") for of in (override, type(override)) for name in ("__module__", "__qualname__"))
    return any(_SAGE.search(name) for name in names) or None


def wrong_for(keys: Iterable[int]) -> str | None:
    """Why sageattention would give wrong results for windows of so many keys; None if it is right, or not installed."""
    sage = BACKENDS["sage"]
    if not installed("sageattention") or sage.keys_multiple is None:
        return None
    multiple = sage.keys_multiple()
    bad = next((n for n in keys if n % multiple), None)
    if bad is None:
        return None
    return f"sageattention, as installed, is wrong for windows of {bad:,} tokens (no multiple of {multiple})."


def host_attention(options: Mapping[str, Any]) -> Backend:
    """The host's attention, with whatever override the user's nodes put in `options`, for use inside one window."""
    import comfy.ldm.wan.model

    # An override that reads the video's layout would take a window for the whole video.
    inside = {key: value for key, value in options.items() if key != "grid_sizes"}

    def attend(q, k, v, scale):
        heads = q.shape[2]
        q, k, v = (x.flatten(2) for x in (q, k, v))
        # Looked up at each call: a launch flag or another pack decides what stands there.
        out = comfy.ldm.wan.model.optimized_attention(q, k, v, heads=heads, transformer_options=inside)
        return out.unflatten(2, (heads, -1))

    return Backend("host", "ComfyUI's own attention", attend)


def with_ours(options: Mapping[str, Any], backend: Backend, say: Callable[[str], None]) -> dict[str, Any]:
    """A copy of `options` by which the host's cross-attention is computed by what attends windows.

    For where nobody chose an attention, see `chosen_by_user`. What is asked for beyond plain attention (masks, other
    layouts, other precision) is left to the host's own; `say` tells that, and where another backend does the work.
    """
    return {**options, _OVERRIDE: _Ours(backend, say)}


def without_ours(options: dict[str, Any]) -> dict[str, Any]:
    """`options` without what `with_ours` put there."""
    if not isinstance(options.get(_OVERRIDE), _Ours):
        return options
    return {key: value for key, value in options.items() if key != _OVERRIDE}


class _Ours:
    """An attention override, as the host calls it."""

    def __init__(self, backend: Backend, say: Callable[[str], None]) -> None:
        self.backend, self.say = backend, say

    def __call__(self, original, q, k, v, heads, *more, **how):
        beyond = sorted(name for name, at in how.items() if name not in _PLAIN and at is not None and at is not False)
        if more or beyond or q.ndim != 3 or k.dtype != q.dtype or v.dtype != q.dtype:
            asked = ", ".join(beyond) or "tensors of other kinds"
            self.say(f"cross-attention is the host's own: it is called with {asked}.")
            return original(q, k, v, heads, *more, **how)
        return serve_text(q, k, v, heads, self.backend, self.say)
