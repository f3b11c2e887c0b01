"""One forward pass of a Wan model under T3: where the video lies, each layer's windows, what attends, what memory.

Settings are what the user asked for; a `ForwardPass` is what follows from them for the latents at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch

from ..t3 import Grid, Partition, Plan
from ..t3.backends import AUTO, Backend, Situation, choose
from ..t3.cost import attention_pairs, other_macs, saving_warning
from ..t3.device_memory import within_limit
from ..t3.memory import AUTO as AUTO_MEMORY
from ..t3.memory import Share, pick
from ..t3.plan import PRESETS
from . import estimate, host_attention, wan

log = logging.getLogger("T3")
# Working memory of lean attention where it goes step by step, unless one window of one head needs more.
LEAN_BYTES = 512 * 2**20
Say = Callable[..., None]


@dataclass(frozen=True)
class Settings:
    """What the user asked for in the node."""

    plan: Plan
    backend: str = AUTO
    memory: str = AUTO
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: frozenset[int] = frozenset()
    verbose: bool = False


@dataclass(frozen=True)
class ForwardPass:
    """Layout of the tokens; for every layer its partition, or None where it runs dense; what attends inside windows.

    `backend` None: the host's own attention, which the user chose. `share`: how blocks share out their work. `memory`:
    bytes attention may work in where it goes step by step, or None.
    """

    layout: wan.Layout
    partitions: tuple[Partition | None, ...]
    backend: Backend | None
    share: Share
    memory: int | None

    def describe(self) -> str:
        """One line: grid, tokens beside it, windows of each distinct layer, backend, how work is shared out."""
        grid = self.layout.grid
        windows = "; ".join(
            "dense" if p is None else f"{_times(p)} windows of up to {_longest(p, grid):,}"
            for p in dict.fromkeys(self.partitions)
        )
        by = "the host's attention" if self.backend is None else self.backend.name
        return f"grid {_times(grid)} = {grid.tokens:,} tokens; {windows}; by {by}; {self.share}."


def plan_forward_pass(
    base: Any, model: Any, x: torch.Tensor, options: Mapping[str, Any], conds: wan.Conds, settings: Settings, say: Say
) -> ForwardPass | None:
    """How to run `model` (the diffusion model of `base`) on latents `x`, or None where it runs dense altogether.

    `options` and `conds` are the host's `transformer_options` and conditions; `say` tells the user something, once.
    """
    if x.ndim != 5:
        say(f"latents of shape {tuple(x.shape)} are not a video's [B, C, T, H, W]; running dense.")
        return None
    if not _active(base, options, settings):
        return None
    layout = wan.layout(model, x, conds)
    partitions = tuple(_partition(settings, layer, layout.grid) for layer in range(len(model.blocks)))
    windowed = [p for p in partitions if p is not None]
    if not windowed and settings.plan != PRESETS["dense"]:
        say(f"grid {_times(layout.grid)} = {layout.grid.tokens:,} tokens is one window in every layer: full attention.")
    if not windowed:
        return None
    situation = Situation(x.device, base.get_dtype_inference(), wan.head_size(model))
    backend = _backend(settings, options, situation, layout, windowed, say)
    # By the host's node, or by another that puts a compiled model in place of the plain one.
    compiled = estimate.is_compiled(options.get("wrappers", {})) or model is not base.diffusion_model
    share = _share(settings, base, model, layout, x, situation.dtype, compiled, say)
    memory = None if share.heads is None else _memory(model, layout, x, situation.dtype, windowed, backend)
    found = ForwardPass(layout, partitions, backend, share, memory)
    _tell_global_tokens(layout, windowed, say)
    _tell_little_saving(model, layout, partitions, say)
    if settings.verbose:
        say(found.describe())
    return found


def _active(base: Any, options: Mapping[str, Any], settings: Settings) -> bool:
    """Whether this noise level lies within the user's start and end."""
    if "sigmas" not in options or (settings.start_percent <= 0 and settings.end_percent >= 1):
        return True
    sigma, sampling = float(options["sigmas"].max()), base.model_sampling
    return sampling.percent_to_sigma(settings.end_percent) < sigma <= sampling.percent_to_sigma(settings.start_percent)


def _partition(settings: Settings, layer: int, grid: Grid) -> Partition | None:
    if layer in settings.dense_blocks:
        return None
    partition = settings.plan.partition(layer, grid)
    return partition if partition.windows > 1 else None


def _backend(
    settings: Settings, options, situation: Situation, layout: wan.Layout, partitions: list[Partition], say: Say
) -> Backend | None:
    """The backend for windows, or None for the host's attention where the user chose that.

    Raises `T3Error` for a backend that cannot serve these tensors or windows.
    """
    keys = [n + (layout.beside or 0) for p in partitions for n in p.window_lengths(layout.grid)]
    if settings.backend == AUTO and (how := host_attention.chosen_by_user(options)):
        # Tokens beside the video attend everything.
        wrong = host_attention.wrong_for([*keys, layout.grid.tokens + layout.beside] if layout.beside else keys)
        sage = host_attention.is_sage(options)
        if wrong is None or not sage:
            say(f"attention inside windows is the one chosen by {how}.")
            if wrong is not None and sage is None:
                say(f"{wrong} If {how} uses it, choose a backend in T3 Attention, or take that node out.")
            return None
        say(f"{wrong} Another backend does the work instead.")
    backend, why = choose(settings.backend, replace(situation, windows=tuple(keys)))
    log.debug("T3 Attention: %s", why)
    return backend


def _share(
    settings: Settings,
    base: Any,
    model,
    layout: wan.Layout,
    x: torch.Tensor,
    dtype: torch.dtype,
    compiled: bool,
    say: Say,
) -> Share:
    """How blocks share out their work in the memory that is free now; says which and why where it matters."""
    tokens = layout.grid.tokens + layout.prefix + (layout.suffix or 0)
    # Where only the host knows how many stand beside the video, some do.
    beside = 1 if layout.beside is None else layout.beside
    shape = estimate.block_shape(model, tokens, x.shape[0], dtype.itemsize, beside)

    def needed(share: Share) -> float:
        return estimate.pass_bytes(model, shape, share, compiled) * estimate.MARGIN

    ways, mode = estimate.ways(model), settings.memory
    free = within_limit(_free_memory(base, x.device), x.device)
    if compiled:
        if mode != AUTO_MEMORY:
            say(f"memory {mode} has no effect under torch.compile, which runs blocks whole.")
        ways, mode = ways[:1], AUTO_MEMORY
    share, why = pick(mode, ways, needed, free)
    if shape.chunk < shape.batch * shape.tokens or share != ways[0]:
        # That it no longer fits is news.
        too_little = mode == AUTO_MEMORY and needed(share) > free
        say(f"memory: {why}", once=f"memory {mode} {share} {shape} {too_little}")
    return share


def _free_memory(base: Any, device: torch.device) -> int:
    """Bytes the host could free on `device` for this pass: with dynamic VRAM, what weights hold too.

    Models run outside of the host's samplers have no patcher, and patchers of older hosts do not know.
    """
    of_patcher = getattr(base.current_patcher, "get_free_memory", None)
    return (of_patcher or comfy.model_management.get_free_memory)(device)


def _memory(
    model,
    layout: wan.Layout,
    x: torch.Tensor,
    dtype: torch.dtype,
    partitions: list[Partition],
    backend: Backend | None,
) -> int:
    """Bytes that lean attention may work in where it goes step by step."""
    beside = layout.prefix + (layout.suffix or 0)
    longest = max(_longest(p, layout.grid) for p in partitions)
    # What t3_attention needs at least: one window of one head, more than one head of the tokens that attend everything.
    least = (5 * longest + 2 * beside) * wan.head_size(model)
    if backend is not None and backend.scores:
        least += 2 * max(longest * (longest + beside), beside * (layout.grid.tokens + beside))
    return max(LEAN_BYTES, x.shape[0] * dtype.itemsize * least)


def _tell_global_tokens(layout: wan.Layout, partitions: list[Partition], say: Say) -> None:
    beside = layout.prefix + (layout.suffix or 0)
    if not beside:
        return
    alone = sum(attention_pairs(layout.grid, p) for p in partitions)
    dearer = sum(attention_pairs(layout.grid, p, beside) for p in partitions) / alone
    say(
        f"{beside:,} tokens of references or context stand beside the video's {layout.grid.tokens:,}. Every window "
        f"attends them too, which makes attention {dearer:.1f} times the work."
    )


def _tell_little_saving(model, layout: wan.Layout, partitions: tuple[Partition | None, ...], say: Say) -> None:
    """Where T3 costs as much as full attention, or more."""
    beside = layout.prefix + (layout.suffix or 0)
    tokens, shape = layout.grid.tokens + beside, estimate.model_shape(model)
    other = other_macs(shape, tokens)
    layers = [*partitions, *(partitions[layer] for layer in shape.control_layers)]
    pairs = [tokens**2 if p is None else attention_pairs(layout.grid, p, beside) for p in layers]
    dense = 2 * shape.dim * len(layers) * tokens**2
    if warning := saving_warning(dense + other, 2 * shape.dim * sum(pairs) + other):
        # Right, only not worth it: no trouble that a log should be searched for.
        say(f"{warning} (grid {_times(layout.grid)}: {layout.grid.tokens:,} tokens)", level=logging.INFO)


def _longest(partition: Partition, grid: Grid) -> int:
    return max(partition.window_lengths(grid))


def _times(numbers) -> str:
    return " x ".join(map(str, numbers))
