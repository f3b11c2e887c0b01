"""T3 on a ComfyUI model: object patches on the blocks of a clone and on their self-attention, and wrappers that tell
them what runs.

Each patch belongs to one module of one model: when the host clones a patched model onto fresh weights (dynamic VRAM,
torch.compile, MultiGPU), `_rebuild` makes new patches for the new modules. What changes from call to call (grid, noise
level, the attention the user chose) is found outside the diffusion model, in an APPLY_MODEL wrapper, and kept on the
patches and not in `transformer_options`: the host's compile node does not guard on those.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..t3 import Partition, t3_attention
from ..t3.chunks import token_chunks
from ..t3.fused import refusal
from ..t3.memory import BlockShape
from . import estimate, projections, wan
from .block import T3Block, T3FeedForward, T3VaceBlock
from .forward_pass import ForwardPass, Settings, plan_forward_pass
from .host_attention import host_attention, without_ours
from .mixed_dtypes import have_weights_cast
from .rope import T3Rope, embedder_of
from .stand_in import StandIn, foreign_forward, is_ours, owner, stop_if_cancelled

KEY = "T3"
ROPE = "rope_embedder"  # of a diffusion model
log = logging.getLogger("T3")


@dataclass(eq=False)
class Installation:
    """T3 on one model. `current` is set for the time of a forward pass; `said` holds what was reported already."""

    settings: Settings
    current: ForwardPass | None = None
    said: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, message: str, once: str | None = None, level: int = logging.WARNING) -> None:
        """Log something the user should know, once; `once`: what makes it the same, where its figures may differ."""
        with self._lock:
            new = (once or message) not in self.said
            self.said.add(once or message)
        if new:
            log.log(level, "T3 Attention: %s", message)


class T3SelfAttention(StandIn):
    """Stands in for the host's `WanSelfAttention.forward` of one module; computes the same but for the windows.

    `T3Block` does its work where the block is ours too and works by chunks.
    """

    def forward(self, x: torch.Tensor, freqs: torch.Tensor, transformer_options: dict | None = None) -> torch.Tensor:
        """`x`: `[B, N, dim]`; `freqs`: the host's rotations. As `WanSelfAttention.forward`."""
        options = without_ours({} if transformer_options is None else transformer_options)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            stop_if_cancelled(x)
        current = self.installation.current
        partition = None if current is None else current.partitions[self.layer]
        if current is None or partition is None:
            return type(self.module).forward(self.module, x, freqs, transformer_options=options)
        if not current.layout.fits(x.shape[1]):
            if not compiling:
                self.installation.say(
                    f"expected {current.layout} and got {x.shape[1]:,} tokens; running those dense. Please report "
                    "which nodes were used."
                )
            return type(self.module).forward(self.module, x, freqs, transformer_options=options)
        return self._windowed(x, freqs, options, current, partition)

    def _windowed(
        self, x: torch.Tensor, freqs: torch.Tensor, options: dict, current: ForwardPass, partition: Partition
    ) -> torch.Tensor:
        from comfy.ldm.flux.math import apply_rope1

        attn = self.module
        patches = options.get("patches", {}).get("attn1_patch", ())
        backend = current.backend or host_attention(options)
        reason = projections.refused(attn, x.shape[1], freqs, patches) or refusal(x)
        if reason is None and torch.compiler.is_compiling():
            return attn.o(projections.attend_compiled(attn, x, freqs, current, partition, backend))
        if reason is None:
            tokens = partial(_some, x)
            return attn.o(projections.attend(attn, x, tokens, freqs, current, partition, backend, _chunks(attn, x)))
        if x.is_cuda and not torch.compiler.is_compiling():
            self.installation.say(f"norm, rotation and windows are made one after the other, slower: {reason}.")
        split = (*x.shape[:2], attn.num_heads, attn.head_dim)
        q = apply_rope1(attn.norm_q(attn.q(x)).view(split), freqs)
        k = apply_rope1(attn.norm_k(attn.k(x)).view(split), freqs)
        v = attn.v(x).view(split)
        out = t3_attention(
            q,
            k,
            v,
            current.layout.grid,
            partition,
            prefix=current.layout.prefix,
            backend=backend,
            memory=current.memory,
        )
        out = out.flatten(2)
        for patch in patches:
            out = patch({"x": out, "q": q, "k": k, "transformer_options": options})
        return attn.o(out)


def _some(x: torch.Tensor, rows: slice) -> torch.Tensor:
    return x[:, rows]


def _chunks(attn: Any, x: torch.Tensor) -> list[slice]:
    """As if the feed-forward were four times as wide as the block; a self-attention does not know it."""
    batch, tokens, dim = x.shape
    return token_chunks(tokens, batch, BlockShape(dim, 4 * dim, attn.num_heads, batch, tokens, x.element_size()).chunk)


def install(model, settings: Settings) -> list[str]:
    """Put T3 on `model`, a clone the caller made. Returns what the user should know about other patches it met.

    Raises `T3Error` for a model that cannot be windowed; then nothing has been changed.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    found = wan.self_attentions(diffusion_model)
    former = [model.object_patches.get(_key(a.path)) for a in found.windowed]
    notes = []
    if any(is_ours(patch) for patch in former):
        notes.append("Replaces the T3 attention of a node before it.")
    if foreign := [patch for patch in former if patch is not None and not is_ours(patch)]:
        notes.append(f"Replaces the self-attention patch of {_owners(foreign)}: the later patch wins.")
    if found.left_dense:
        notes.append(f"Stay dense, being attention of another kind: {', '.join(found.left_dense)}.")
    free, notes_on_blocks = _free_blocks(model, wan.blocks(diffusion_model))
    _put(model, found.windowed, free, [b for b in free if _keeps_feed_forward(model, b)], Installation(settings))
    if cast := have_weights_cast(model):
        notes.append(cast)
    return notes + notes_on_blocks


def _free_blocks(model, blocks: list[wan.Block]) -> tuple[list[wan.Block], list[str]]:
    """The blocks whose forward nobody else has patched, and notes on the others and on what is inside the blocks."""
    notes = []
    patches = {block.path: model.object_patches.get(_key(block.path)) for block in blocks}
    taken = {path: patch for path, patch in patches.items() if patch is not None and not is_ours(patch)}
    if taken:
        notes.append(f"{len(taken)} blocks keep the forward of {_owners(taken.values())}, and the memory that takes.")
    crossed = [model.object_patches.get(_key(f"{block.path}.cross_attn")) for block in blocks]
    if theirs := [patch for patch in crossed if patch is not None]:
        notes.append(f"Keeps the cross-attention of {_owners(theirs)}, which gets all tokens at once.")
    fed = [model.object_patches.get(_key(f"{block.path}.ffn")) for block in blocks if block.path not in taken]
    if theirs := [patch for patch in fed if patch is not None and not is_ours(patch)]:
        whose = _owners(theirs)
        notes.append(f"{len(theirs)} blocks keep the feed-forward of {whose}, run whole, and take the memory of that.")
    return [block for block in blocks if block.path not in taken], notes


def _owners(patches: Iterable[Any]) -> str:
    """Whose these patches are, each named once."""
    return ", ".join(sorted(set(map(owner, patches))))


def settings_of(model) -> Settings | None:
    """What a node before asked for, where `model` has T3 already."""
    found = _installation_of(model.object_patches.values())
    return None if found is None else found.settings


def _keeps_feed_forward(model, block: wan.Block) -> bool:
    """Whether nobody else has patched a block's feed-forward: its forward, or the module itself."""
    module = f"{wan.PREFIX}{block.path}.ffn"
    former = model.object_patches.get(f"{module}.forward")
    # Of a module that is itself a patch, the host could not take off a patch inside: it would hit what stood there.
    return module not in model.object_patches and (former is None or is_ours(former))


def _free_embedder(model) -> torch.nn.Module | None:
    """What makes RoPE's tables, where nobody else has patched it."""
    former = model.object_patches.get(_key(ROPE))
    if f"{wan.PREFIX}{ROPE}" in model.object_patches or not (former is None or is_ours(former)):
        return None
    return embedder_of(model.model.diffusion_model)


def _put(
    model,
    attentions: list[wan.SelfAttention],
    blocks: list[wan.Block],
    feed_forwards: list[wan.Block],
    installation: Installation,
) -> None:
    """Patches for these modules, and wrappers and callbacks for this installation in place of former ones.

    feed_forwards: the blocks whose feed-forward is to be patched.
    """
    for attention in attentions:
        patch = T3SelfAttention(attention.module, attention.layer, installation)
        model.add_object_patch(_key(attention.path), patch.forward)
    for block in blocks:
        kind = T3VaceBlock if hasattr(block.module, "after_proj") else T3Block
        model.add_object_patch(_key(block.path), kind(block.module, block.layer, installation).forward)
    for block in feed_forwards:
        path = f"{block.path}.ffn"
        ffn = model.get_model_object(wan.PREFIX + path)
        model.add_object_patch(_key(path), T3FeedForward(ffn, block.layer, installation).forward)
    embedder = _free_embedder(model)
    if embedder is not None:
        model.add_object_patch(_key(ROPE), T3Rope(embedder, 0, installation).forward)
    wrappers = {
        WrappersMP.APPLY_MODEL: partial(_apply_model, installation),
        WrappersMP.PREPARE_SAMPLING: partial(estimate.prepare_sampling, installation.settings.memory),
        WrappersMP.CALC_COND_BATCH: estimate.calc_cond_batch,
    }
    for kind, wrapper in wrappers.items():
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, partial(_rebuild, installation))


def _rebuild(installation: Installation, old, new) -> None:
    """ON_CLONE: patches that came along to a model of its own are made anew for that model's modules."""
    if new.model is old.model:
        return
    fresh = new.model.diffusion_model

    def ours(found: list, inside: str = "") -> list:
        return [part for part in found if is_ours(new.object_patches.get(_key(part.path + inside)))]

    attentions, blocks = wan.self_attentions(fresh).windowed, wan.blocks(fresh)
    fresh_installation = Installation(installation.settings)
    # A block that is somebody else's by now may have a feed-forward that is still ours.
    _put(new, ours(attentions), ours(blocks), ours(blocks, ".ffn"), fresh_installation)
    if cast := have_weights_cast(new):
        fresh_installation.say(cast)


def _key(path: str) -> str:
    return f"{wan.PREFIX}{path}.forward"


def _installation_in(model) -> Installation | None:
    """The installation whose patches stand in this diffusion model, if any do."""
    modules = [found.module for found in wan.self_attentions(model).windowed]
    modules += [block.module for block in wan.blocks(model)]
    return _installation_of(vars(module).get("forward") for module in modules)


def _installation_of(patches: Iterable[Any]) -> Installation | None:
    """The installation of the first of these that is ours, if any is."""
    return next((patch.__self__.installation for patch in patches if is_ours(patch)), None)


def _apply_model(
    bound: Installation,
    executor,
    x,
    t,
    c_concat=None,
    c_crossattn=None,
    control=None,
    transformer_options=None,
    **conds,
):
    """APPLY_MODEL wrapper: find out what this forward pass is, tell the patches, and let it run."""
    options = {} if transformer_options is None else transformer_options
    base = executor.class_obj
    # Under the host's compile node the compiled model stands in place of the plain one.
    model = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)
    # MultiGPU CFG Split runs the models of further cards, at the same time, with the wrappers of the first card's.
    installation = _installation_in(model) or bound
    _report_foreign(model, installation)
    installation.current = plan_forward_pass(base, model, x, options, conds, installation.settings, installation.say)
    try:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
    finally:
        installation.current = None


def _report_foreign(model, installation: Installation) -> None:
    """Say whose patches took the place of ours after this node."""
    attentions = [found.module for found in wan.self_attentions(model).windowed]
    blocks = [block.module for block in wan.blocks(model)]
    places = (
        (attentions, "later self-attention patch", "instead of T3"),
        (blocks, "later forward", "and take the memory of that"),
        ([block.ffn for block in blocks], "feed-forward", "whole, and take the memory of that"),
    )
    for modules, what, so in places:
        taken = [patch for patch in map(foreign_forward, modules) if patch is not None]
        if taken:
            installation.say(f"{len(taken)} blocks run the {what} of {_owners(taken)} {so}.")
