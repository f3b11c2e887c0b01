"""The T3 Attention node: windows instead of full self-attention on a Wan model."""

from __future__ import annotations

import re

from comfy_api.latest import io

from ..t3 import Plan
from ..t3.backends import AUTO, AUTO_INT8, BACKENDS, Situation, choose
from ..t3.errors import T3Error
from ..t3.memory import MODES
from ..t3.plan import PRESETS
from . import wan
from .forward_pass import Settings
from .host_attention import chosen_by_user
from .patch import install
from .plan_of_weights import PlanOfWeights, note_on_mismatch, plan_of_weights
from .types import T3PlanType
from .verdict import verdict

# More than any model has. Checked before a range is written out, which happens before the model is there.
_MOST_BLOCKS = 1000


class T3Attention(io.ComfyNode):
    """Switches a Wan model's self-attention to T3 on a clone; everything else is in `patch.py`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3Attention",
            display_name="T3 Attention",
            category="T3",
            description=(
                "Computes a Wan model's self-attention in small windows (T3), so that 4K video takes minutes and not "
                "hours. Needs T3-tuned weights: stock weights give noise."
            ),
            search_aliases=["sparse attention", "window attention", "4k", "wan", "transform trained transformer"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan2.1 or Wan2.2 model with T3-tuned weights."),
                io.Combo.Input(
                    "plan",
                    options=["auto", *PRESETS],
                    default="auto",
                    tooltip="Which windows each layer uses. auto: the plan that the weights brought along, else the "
                    "released one of the model's family, fitted to the size of the video. dense: full attention, to "
                    "compare.",
                ),
                io.Combo.Input(
                    "backend",
                    options=[AUTO, AUTO_INT8, *BACKENDS],
                    default="auto",
                    tooltip="What computes attention inside a window. auto: the attention you chose by another node or "
                    "a launch flag; where you chose none, the fastest exact one for your card. auto-int8: the "
                    "fastest measured on your card, 8-bit ones included. "
                    f"Not exact, in 8 bits: {', '.join(b.name for b in BACKENDS.values() if not b.exact)}.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="fast attends all heads at once; lean takes few at a time, for the same result in much "
                    "less memory, slower. auto takes the fastest way that fits the free memory, and says which.",
                    advanced=True,
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling T3 begins: 0 is the first step. Before it attention is full.",
                    advanced=True,
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling T3 ends: 1 is the last step. After it attention is full.",
                    advanced=True,
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    tooltip='Blocks that keep full attention, by number: "0, 1, 28-29". Empty: none.',
                    advanced=True,
                ),
                io.Boolean.Input(
                    "verbose",
                    default=False,
                    tooltip="Log the windows of every layer, once for each layout of the video.",
                    advanced=True,
                ),
                T3PlanType.Input(
                    "custom_plan",
                    optional=True,
                    tooltip="A plan from the T3 Plan node; used instead of the choice above.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", display_name="model", tooltip="The model with T3 attention."),
                io.String.Output("REPORT", display_name="report", tooltip="What was done, and what to know about it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, start_percent=None, end_percent=None, dense_blocks=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        ranges = verdict(_check_range, start_percent, end_percent)
        return verdict(parse_blocks, dense_blocks, None) if ranges is True else ranges

    @classmethod
    def execute(
        cls, model, plan, backend, memory, start_percent, end_percent, dense_blocks, verbose, custom_plan=None
    ) -> io.NodeOutput:
        _check_range(start_percent, end_percent)
        diffusion_model = model.get_model_object("diffusion_model")
        layers = len(wan.self_attentions(diffusion_model).windowed)
        weights = plan_of_weights(model)
        chosen, reason = _plan(plan, custom_plan, weights, diffusion_model)
        settings = Settings(
            plan=chosen,
            backend=backend,
            memory=memory,
            start_percent=start_percent,
            end_percent=end_percent,
            dense_blocks=parse_blocks(dense_blocks, len(diffusion_model.blocks)),
            verbose=verbose,
        )
        if backend != AUTO:
            choose(
                backend, Situation(model.load_device, model.model.get_dtype_inference(), wan.head_size(diffusion_model))
            )
        patched = model.clone()
        notes = install(patched, settings)
        options = patched.model_options.get("transformer_options", {})
        notes += _about_weights(chosen, weights.tuned if weights else None)
        return io.NodeOutput(patched, _report(diffusion_model, settings, reason, layers, notes, options))


def _check_range(start: float | None, end: float | None) -> None:
    if start is not None and end is not None and start >= end:
        raise T3Error(
            f"start_percent is {start:g} and end_percent {end:g}: T3 would never run. Start must be less than end; "
            "0 and 1 use it throughout."
        )


def parse_blocks(text: str | None, count: int | None) -> frozenset[int]:
    """Block numbers from text like "0, 1, 47-49". `count` is how many blocks there are, if that is known.

    Raises `T3Error` for what is no number or range, and for blocks the model does not have.
    """
    blocks: set[int] = set()
    for part in (part.strip() for part in (text or "").split(",")):
        if not part:
            continue
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        if match is None:
            raise T3Error(
                f'dense_blocks has {part!r}; write numbers and ranges, e.g. "0, 1, 28-29", or leave it empty.'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise T3Error(f"dense_blocks has {part!r}, which runs backwards. Write {last}-{first}.")
        if count is not None and last >= count:
            raise T3Error(f"dense_blocks has {part!r}; this model has blocks 0 to {count - 1}. Nearest: {count - 1}.")
        if last >= _MOST_BLOCKS:
            raise T3Error(f"dense_blocks has {part!r}; no model has so many. Wan 14B has blocks 0 to 39.")
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


def _plan(name: str, custom: Plan | None, weights: PlanOfWeights | None, diffusion_model) -> tuple[Plan, str]:
    """The plan to use, and why. `weights`: what a node before says of them."""
    if custom is not None:
        return custom, "the connected plan"
    if name != "auto":
        return Plan.preset(name), "as chosen"
    if weights is not None:
        whose = "of the weights" if weights.chosen == weights.tuned else "connected to T3 LoRA Retrofit Loader"
        return weights.chosen, f"the plan {whose}"
    channels = wan.latent_channels(diffusion_model)
    return Plan.for_latent_channels(channels), f"the released plan for models of {channels}-channel latents"


def _report(diffusion_model, settings: Settings, reason: str, layers: int, notes: list[str], options: dict) -> str:
    plan = settings.plan
    counts = "; ".join(" x ".join(map(str, layer)) for layer in plan.layers)
    dense = len(settings.dense_blocks)
    lines = [
        f"T3 Attention on {type(diffusion_model).__name__}: {layers} self-attentions"
        + (f", of which blocks {', '.join(map(str, sorted(settings.dense_blocks)))} stay dense." if dense else "."),
        f"Plan {plan.name} ({reason}), written for {' x '.join(map(str, plan.grid))} tokens: "
        f"{counts} windows, in turn.",
    ]
    if settings.start_percent > 0 or settings.end_percent < 1:
        lines.append(
            f"From {settings.start_percent:.0%} to {settings.end_percent:.0%} of sampling; full attention else."
        )
    if settings.backend == AUTO and (how := chosen_by_user(options)):
        lines.append(f"Attention inside windows: the one chosen by {how}.")
    lines += notes
    return "\n".join(lines)


def _about_weights(plan: Plan, tuned: Plan | None) -> list[str]:
    """What is known of the weights that this plan needs."""
    if tuned is not None:
        return note_on_mismatch(plan, tuned)
    if plan == PRESETS["dense"]:
        return []
    return [
        "Whether these weights are T3-tuned cannot be told from the file. If the video is noise, they are not: use "
        "the released T3 checkpoints, or plan dense."
    ]
