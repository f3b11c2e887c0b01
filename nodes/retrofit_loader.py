"""T3 LoRA Retrofit Loader: T3-tuned weights in whatever form they come, and the attention they were tuned for."""

from __future__ import annotations

import dataclasses
import logging

from comfy_api.latest import io

from ..t3 import Plan
from ..t3.errors import T3Error
from ..t3.weights import ApplyReport, Identity, identify, open_weights
from ..t3.weights.fit import check_fit
from . import model_files, patch, plan_of_weights, weight_patches
from .forward_pass import Settings
from .plan_of_weights import PlanOfWeights
from .types import T3PlanType

FOLDERS = ("loras", "diffusion_models")
log = logging.getLogger("T3")


class T3RetrofitLoader(io.ComfyNode):
    """Patches on a clone, so that weights stack with other LoRAs; the sums are those of docs/weights.md."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3RetrofitLoader",
            display_name="T3 LoRA Retrofit Loader",
            category="T3",
            description=(
                "Puts T3-tuned weights on a Wan model: a LoRA of any kind and key style, a difference, or a whole "
                "checkpoint. A file that carries its plan brings T3 attention along."
            ),
            search_aliases=[
                "lora",
                "load lora",
                "lora loader",
                "retrofit",
                "diff",
                "dora",
                "lokr",
                "loha",
                "t3 weights",
                "tuned weights",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The Wan model the weights were made for."),
                io.Combo.Input(
                    "file",
                    options=model_files.listed(*FOLDERS),
                    tooltip="A safetensors file in models/loras or models/diffusion_models. What it is, is found from "
                    "its content.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="1: as tuned. 0: the node does nothing. A whole checkpoint moves the model this far "
                    "towards its weights.",
                ),
                T3PlanType.Input(
                    "custom_plan",
                    optional=True,
                    tooltip="A plan from the T3 Plan node; used instead of the plan in the file.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "MODEL",
                    display_name="model",
                    tooltip="The model with these weights, and with T3 attention where there is a plan.",
                ),
                io.String.Output(
                    "REPORT", display_name="report", tooltip="What was applied, and what to know about it."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        return model_files.verdict_on(file, *FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, file=None, **_) -> str:
        """Changes when the file does."""
        return model_files.state(file, *FOLDERS)

    @classmethod
    def execute(cls, model, file, strength, custom_plan=None) -> io.NodeOutput:
        opened = open_weights(model_files.find(file, *FOLDERS))
        found = identify(opened)
        target = weight_patches.Target.of(model)
        check_fit(opened, found, target.shapes)
        weight_patches.check_finite(opened, found)
        plan = _plan(model, found, custom_plan) if strength else None
        patched = model.clone()
        lines = [f"{file} for {found.what}"]
        changes = weight_patches.pieces(opened, found)
        report = ApplyReport(found.form, found.dialect, len(found.matched), [], found.unused, found.t3, strength)
        if strength:
            weight_patches.put(patched, opened, changes, strength)
            report.changed = sorted({piece.target for piece in changes})
        lines.append(_sentence(report.describe()))
        if found.unused:
            lines.append(f"Known, and of no use here: {', '.join(map(repr, found.unused))}.")
        lines += [_sentence(line) for line in [*found.t3.describe(), *found.notes]]
        lines += _attention(patched, plan, custom_plan, found) if strength else ["At strength 0 nothing is done."]
        warnings = _warnings(target.fingerprint(model), found, strength)
        for warning in warnings:
            log.warning("T3 LoRA Retrofit Loader: %s: %s", file, warning)
        return io.NodeOutput(patched, "\n".join([*lines, *(f"WARNING: {warning}" for warning in warnings)]))


def _plan(model, found: Identity, connected: Plan | None) -> PlanOfWeights | None:
    """The plan to install and the one that the weights are tuned for, or None where there is none to install.

    Raises `T3Error` where two files ask for different ones and nobody chose.
    """
    before, named = plan_of_weights.plan_of_weights(model), found.t3.plan
    if connected is not None:
        return PlanOfWeights(named or (before.tuned if before else None), connected)
    if named is None:
        return None
    if before is None:
        return PlanOfWeights(named, named)
    if before.tuned is None and before.chosen == named:
        return PlanOfWeights(named, named)
    if before.tuned == named:
        # A plan connected to a node before stays chosen.
        return before
    other = f"for {before.tuned.name!r}" if before.tuned else f"were given {before.chosen.name!r}"
    raise T3Error(
        f"these weights are tuned for plan {named.name!r}, and those loaded before them {other}, another one. Connect "
        "a T3 Plan as custom_plan to say which windows to use."
    )


def _attention(patched, plan: PlanOfWeights | None, connected: Plan | None, found: Identity) -> list[str]:
    """Install the plan, where there is one; what to say of it."""
    before = patch.settings_of(patched)
    if plan is None:
        if before is not None:
            return [f"The file names no plan; T3 attention stays as it is, plan {before.plan.name}."]
        return ["The file names no plan, so attention stays as it is. Put T3 Attention behind this node."]
    # Whatever else a T3 Attention node before this one was told stays.
    settings = Settings(plan.chosen) if before is None else dataclasses.replace(before, plan=plan.chosen)
    notes = patch.install(patched, settings)
    plan_of_weights.set_plan_of_weights(patched, plan)
    whose = "from the file" if plan.chosen == found.t3.plan else "the one connected to a node before"
    whose = whose if connected is None else "the connected one"
    line = f"T3 attention with plan {plan.chosen.name}, {whose}. T3 Attention behind this node has more to set."
    return [line, *plan_of_weights.note_on_mismatch(plan.chosen, plan.tuned), *notes]


def _warnings(loaded, found: Identity, strength: float) -> list[str]:
    warnings = []
    if found.t3.plan is None:
        warnings.append(
            "no T3 metadata: cannot tell whether these weights are T3-tuned. With others, T3 attention gives noise."
        )
    base = found.t3.base
    # A whole checkpoint at strength 1 leaves nothing of the base.
    replaces = found.form == "full" and strength == 1
    if base is not None and loaded is not None and not replaces and not base.fits(loaded):
        warnings.append(
            f"made for another base ({base.describe()}) than the one loaded ({loaded.describe()}). Expect noise, or "
            "load the base it was made for."
        )
    return warnings


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")
