"""T3 on a ComfyUI model: object patches on the self-attention of a clone, and wrappers that tell them what runs.

Each patch belongs to one module of one model: when the host clones a patched model onto fresh weights (dynamic VRAM,
torch.compile, MultiGPU), `_rebuild` makes new patches for the new modules. What changes from call to call (grid, noise
level, the attention the user chose) is found outside the diffusion model, in an APPLY_MODEL wrapper, and kept on the
patches and not in `transformer_options`: the host's compile node does not guard on those.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..t3 import Grid, Partition, Plan, t3_attention
from ..t3.backends import Backend, Situation, choose
from . import estimate, wan

KEY = "T3"
AUTO, FAST, LEAN = "auto", "fast", "lean"
# Working memory of lean attention, unless one window of one head needs more.
LEAN_BYTES = 512 * 2**20
log = logging.getLogger("T3")


@dataclass(frozen=True)
class Settings:
    """What the user asked for. `plan` None: the released plan of the model's family."""

    plan: Plan
    backend: str = "auto"
    memory: str = AUTO
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: frozenset[int] = frozenset()
    verbose: bool = False


@dataclass(frozen=True)
class Run:
    """One forward pass: where the video lies, and for every layer its partition, or None where it runs dense.

    `backend` None: attention inside windows is the host's own, which the user chose.
    """

    layout: wan.Layout
    partitions: tuple[Partition | None, ...]
    backend: Backend | None
    memory: int | None


@dataclass(eq=False)
class Installation:
    """T3 on one model. `run` is set for the time of a forward pass; `said` holds what was reported already."""

    settings: Settings
    run: Run | None = None
    said: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, message: str) -> None:
        """Log something the user should know, once."""
        with self._lock:
            new = message not in self.said
            self.said.add(message)
        if new:
            log.warning("T3 Attention: %s", message)


class T3SelfAttention:
    """Stands in for the host's `WanSelfAttention.forward` of one module; computes the same but for the windows."""

    def __init__(self, module: torch.nn.Module, layer: int, installation: Installation) -> None:
        self.module = module
        self.layer = layer
        self.installation = installation

    def forward(self, x: torch.Tensor, freqs: torch.Tensor, transformer_options: dict | None = None) -> torch.Tensor:
        """`x`: `[B, N, dim]`; `freqs`: the host's rotations. As `WanSelfAttention.forward`."""
        options = {} if transformer_options is None else transformer_options
        if not torch.compiler.is_compiling():
            comfy.model_management.throw_exception_if_processing_interrupted()
        run = self.installation.run
        partition = None if run is None else run.partitions[self.layer]
        if run is not None and partition is not None and not run.layout.fits(x.shape[1]):
            partition = None
            if not torch.compiler.is_compiling():
                self.installation.say(
                    f"expected {run.layout} and got {x.shape[1]:,} tokens; running those dense. Please report which "
                    "nodes were used."
                )
        if run is None or partition is None:
            return type(self.module).forward(self.module, x, freqs, transformer_options=options)
        return self._windowed(x, freqs, options, run, partition)

    def _windowed(self, x: torch.Tensor, freqs: torch.Tensor, options: dict, run: Run, partition: Partition):
        from comfy.ldm.flux.math import apply_rope1

        attn: Any = self.module
        split = (*x.shape[:2], attn.num_heads, attn.head_dim)
        q = apply_rope1(attn.norm_q(attn.q(x)).view(split), freqs)
        k = apply_rope1(attn.norm_k(attn.k(x)).view(split), freqs)
        v = attn.v(x).view(split)
        backend = run.backend or _host_attention(options)
        out = t3_attention(
            q, k, v, run.layout.grid, partition, prefix=run.layout.prefix, backend=backend, memory=run.memory
        )
        out = out.flatten(2)
        for patch in options.get("patches", {}).get("attn1_patch", ()):
            out = patch({"x": out, "q": q, "k": k, "transformer_options": options})
        return attn.o(out)


def _host_attention(options: Mapping[str, Any]) -> Backend:
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


def chosen_by_user(options: Mapping[str, Any]) -> str | None:
    """How the user chose an attention of their own, in words, or None where nobody did."""
    from comfy.cli_args import args

    if "optimized_attention_override" in options:
        return "another node's attention override"
    flags = (
        "use_sage_attention",
        "use_flash_attention",
        "use_split_cross_attention",
        "use_quad_cross_attention",
        "use_pytorch_cross_attention",
        "force_upcast_attention",
    )
    return next((f"the launch flag --{flag.replace('_', '-')}" for flag in flags if getattr(args, flag, False)), None)


def install(model, settings: Settings) -> list[str]:
    """Put T3 on `model`, a clone the caller made. Returns what the user should know about other patches it met.

    Raises `T3Error` for a model that cannot be windowed; then nothing has been changed.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    blocks = list(wan.attention_blocks(diffusion_model))
    notes = []
    former = {path: model.object_patches.get(_key(path)) for path, _, _ in blocks}
    if any(_ours(patch) for patch in former.values()):
        notes.append("Replaces the T3 Attention node before it.")
    foreign = sorted({_owner(patch) for patch in former.values() if patch is not None and not _ours(patch)})
    if foreign:
        notes.append(f"Replaces the self-attention patch of {', '.join(foreign)}: the later patch wins.")
    _add_patches(model, blocks, Installation(settings))
    for kind, wrapper in _WRAPPERS.items():
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _rebuild)
    return notes


def _key(path: str) -> str:
    return f"{wan.PREFIX}{path}.forward"


def _add_patches(model, blocks, installation: Installation) -> None:
    for path, module, layer in blocks:
        model.add_object_patch(_key(path), T3SelfAttention(module, layer, installation).forward)


def _ours(patch: Any) -> bool:
    return isinstance(getattr(patch, "__self__", None), T3SelfAttention)


def _owner(patch: Any) -> str:
    return getattr(patch, "__module__", None) or type(patch).__module__


def _rebuild(old, new) -> None:
    """ON_CLONE: patches that came along to a model of its own are made anew for that model's modules."""
    if new.model is old.model:
        return
    installation = None
    for path, module, layer in wan.attention_blocks(new.model.diffusion_model):
        patch = new.object_patches.get(_key(path))
        if _ours(patch):
            installation = installation or Installation(patch.__self__.installation.settings)
            new.add_object_patch(_key(path), T3SelfAttention(module, layer, installation).forward)


def installation_on(diffusion_model) -> Installation | None:
    """The installation whose patches are in place on this diffusion model right now, if any."""
    for block in diffusion_model.blocks:
        if _ours(forward := block.self_attn.__dict__.get("forward")):
            return forward.__self__.installation
    return None


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    """APPLY_MODEL wrapper: find out what this forward pass is, tell the patches, and let it run."""
    options = {} if transformer_options is None else transformer_options
    base = executor.class_obj
    # Under the host's compile node the compiled model stands in place of the plain one.
    model = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)
    installation = installation_on(model)
    if installation is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
    _report_foreign(model, installation)
    installation.run = _plan_run(base, model, x, options, conds, installation)
    try:
        with estimate.replaced(base, type(base).memory_required.__get__(base)):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
    finally:
        installation.run = None


def _report_foreign(model, installation: Installation) -> None:
    """Say whose patch took the place of ours after this node."""
    others = [block.self_attn.__dict__.get("forward") for block in model.blocks]
    taken = [patch for patch in others if patch is not None and not _ours(patch) and _is_patch(patch)]
    if taken:
        owners = ", ".join(sorted({_owner(patch) for patch in taken}))
        installation.say(f"{len(taken)} blocks run the later self-attention patch of {owners} instead of T3.")


def _is_patch(forward: Any) -> bool:
    """False for the module's own method, which the host leaves behind when it takes a patch off."""
    return getattr(forward, "__func__", None) is not getattr(type(getattr(forward, "__self__", None)), "forward", None)


def _plan_run(base, model, x, options, conds: Mapping[str, Any], installation: Installation) -> Run | None:
    settings = installation.settings
    if x.ndim != 5:
        installation.say(f"latents of shape {tuple(x.shape)} are not a video's [B, C, T, H, W]; running dense.")
        return None
    if not _active(base, options, settings):
        return None
    layout = wan.layout(model, x, conds)
    dtype = base.get_dtype_inference()
    backend = _backend(settings, options, Situation(x.device, dtype, model.dim // model.num_heads), installation)
    partitions = tuple(_partition(settings, layer, layout.grid) for layer in range(len(model.blocks)))
    memory = _memory(settings, model, layout, x, dtype, partitions)
    run = Run(layout, partitions, backend, memory)
    if settings.verbose:
        installation.say(describe_run(run))
    return run


def _active(base, options: Mapping[str, Any], settings: Settings) -> bool:
    """Whether this noise level lies within the user's start and end."""
    if settings.start_percent <= 0 and settings.end_percent >= 1:
        return True
    sampling = base.model_sampling
    sigma = float(options["sigmas"].max()) if "sigmas" in options else float("inf")
    return sampling.percent_to_sigma(settings.end_percent) <= sigma <= sampling.percent_to_sigma(settings.start_percent)


def _partition(settings: Settings, layer: int, grid: Grid) -> Partition | None:
    if layer in settings.dense_blocks:
        return None
    partition = settings.plan.partition(layer, grid)
    return partition if partition.windows > 1 else None


def _backend(settings: Settings, options, situation: Situation, installation: Installation) -> Backend | None:
    if settings.backend == "auto" and (how := chosen_by_user(options)):
        installation.say(f"attention inside windows is the one chosen by {how}.")
        return None
    backend, why = choose(settings.backend, situation)
    log.debug("T3 Attention: %s", why)
    return backend


def _memory(settings: Settings, model, layout: wan.Layout, x, dtype: torch.dtype, partitions) -> int | None:
    """Bytes that attention may work in, or None for as many as it likes."""
    head = x.shape[0] * (model.dim // model.num_heads) * dtype.itemsize
    beside = layout.prefix + (layout.suffix or 0)
    if settings.memory == AUTO:
        # Attention holds its input twice, q, k, v, the output and five window copies; beside the FFN that is little.
        needed = 12 * (layout.grid.tokens + beside) * head * model.num_heads
        if needed < comfy.model_management.get_free_memory(x.device):
            return None
    elif settings.memory == FAST:
        return None
    longest = max((size for p in partitions if p for _, size in p.window_classes(layout.grid)), default=0)
    least = (5 * longest + 2 * beside) * head if not beside else 2 * (layout.grid.tokens + beside) * head
    return max(LEAN_BYTES, least)


def describe_run(run: Run) -> str:
    """One line on a forward pass: grid, tokens beside it, windows of each distinct layer."""
    grid = run.layout.grid
    distinct = dict.fromkeys(run.partitions)
    windows = "; ".join(
        "dense"
        if p is None
        else f"{' x '.join(map(str, p))} windows of up to {max(s for _, s in p.window_classes(grid)):,}"
        for p in distinct
    )
    beside = f", {run.layout.prefix} tokens before it" if run.layout.prefix else ""
    by = "the host's attention" if run.backend is None else run.backend.name
    bound = "" if run.memory is None else f", within {run.memory / 2**20:,.0f} MiB"
    return f"grid {' x '.join(map(str, grid))} = {grid.tokens:,} tokens{beside}; {windows}; by {by}{bound}."


def _prepare_sampling(executor, model, *args, **kwargs):
    """PREPARE_SAMPLING wrapper: the host decides what to offload by what T3 needs."""
    with estimate.corrected(model.model):
        return executor(model, *args, **kwargs)


def _calc_cond_batch(executor, model, conds, x_in, *args, **kwargs):
    """CALC_COND_BATCH wrapper: the host decides by the same estimate whether condition and negative fit together."""
    with estimate.corrected(model, samples=x_in.shape[0]):
        return executor(model, conds, x_in, *args, **kwargs)


_WRAPPERS: dict[str, Callable] = {
    WrappersMP.APPLY_MODEL: _apply_model,
    WrappersMP.PREPARE_SAMPLING: _prepare_sampling,
    WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
}
