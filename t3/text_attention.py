"""Cross-attention: many tokens of a video against the few of a text or an image, by what attends a layer's windows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from .attention import attend_window
from .backends import AUTO, BACKENDS, Backend, Situation, choose
from .fused import is_one_operator
from .kernels.namespace import own_namespace

log = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def backend_for_text(backend: Backend, s: Situation) -> tuple[Backend, str | None]:
    """What attends a text where `backend` attends a layer's windows, and why it is another one, or None.

    It is the same one where that is exact: tens of thousands of queries fill a card as long windows do. In 8 bits, or
    with all scores held at once, nobody asked for it beyond windows: the fastest exact one as a rule, untimed, is
    taken then, and where `backend` cannot serve `s` (with `s.windows` the numbers of keys).
    """
    why: str | None
    if not backend.exact:
        why = f"{backend.name} computes in 8 bits"
    elif backend.scores:
        why = f"{backend.name} holds the scores of all tokens at once"
    else:
        why = backend.refusal(s)
    if why is None:
        return backend, None
    return choose(AUTO, replace(s, windows=()))[0], why


def serving(backend: Backend, q: torch.Tensor, k: torch.Tensor, heads: int, say: Callable[[str], None]) -> Backend:
    """`backend_for_text` for these q `[B, n, heads*head_dim]` and k; `say` is told where it is not `backend`."""
    found, why = backend_for_text(backend, Situation(q.device, q.dtype, q.shape[2] // heads, windows=(k.shape[1],)))
    if why is not None:
        say(f"cross-attention is computed by {found.name}: {why}.")
    return found


def attend_text(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: Backend) -> torch.Tensor:
    """Dense attention of q `[B, n, heads*head_dim]` over k, v `[B, m, heads*head_dim]`, one dtype; q's shape.

    backend: from `serving`. The scale is head_dim**-0.5, as both hosts have it.
    """
    q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
    # A last chunk may be one token, for which kernels made for windows need not be made.
    some = BACKENDS["sdpa"] if q.shape[1] == 1 else backend
    return attend_window(some, q.shape[3] ** -0.5, q, k, v).flatten(2)


def serve_text(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: Backend, say: Callable[[str], None]
) -> torch.Tensor:
    """`attend_text` by what serves where `backend` attends windows. Compiled code, in which nothing can be said, holds
    it as one operator, which logs what there is to say."""
    if is_one_operator(backend):
        return _serve_text(q, k, v, heads, backend.name)
    return attend_text(q, k, v, heads, serving(backend, q, k, heads, say))


@torch.library.custom_op(f"{own_namespace(__name__)}::serve_text", mutates_args=())
def _serve_text(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, backend: str) -> torch.Tensor:
    """`serve_text` as one operator."""
    return attend_text(q, k, v, heads, serving(BACKENDS[backend], q, k, heads, _log_once)).contiguous()


@_serve_text.register_fake
def _(q, k, v, heads, backend):
    return q.new_empty(q.shape)


def say_nothing(message: str) -> None:
    """For compiled code, which cannot say anything: its operators log."""


@lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    log.warning("T3: %s", message)
