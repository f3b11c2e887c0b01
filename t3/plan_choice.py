"""Which plan a command runs or writes under: the one asked for, the one that weights carry, or the released one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import T3Error
from .plan import Plan

if TYPE_CHECKING:
    from .adapters import Adapter
    from .sources import Sources


def named_plan(text: str) -> tuple[Plan, str]:
    """The plan that `--plan` names, a preset or a JSON file, and why. Raises `T3Error` for anything else."""
    path = Path(text)
    if path.suffix.lower() != ".json" and not path.is_file():
        return Plan.preset(text), "as asked"
    try:
        return Plan.from_json(path.read_text(encoding="utf-8")), f"from {path}"
    except (OSError, UnicodeDecodeError, T3Error) as error:
        raise T3Error(f"--plan {text} cannot be used: {error}") from None


def resolve_plan(text: str, sources: Sources) -> tuple[Plan, str]:
    """The plan of a run, and why: as `named_plan`, or for `auto` the plan the weights carry, else the released one for
    the model's kind of latents. Raises `T3Error` also where weights carry plans that differ.
    """
    if text == "auto":
        if sources.plan_json:
            if sources.plan_conflict:
                raise T3Error(sources.plan_conflict)
            return Plan.from_json(sources.plan_json), f"carried by {sources.plan_from}"
        plan = Plan.for_latent_channels(sources.latent_channels)
        return plan, f"the released plan for models of {sources.latent_channels}-channel latents"
    plan, reason = named_plan(text)
    if sources.plan_json and (carried := Plan.from_json(sources.plan_json)) != plan:
        reason += f", instead of {carried.name!r}, carried by {sources.plan_from}"
    return plan, reason


def carried_plan(tuned: Sequence[Adapter], loras: Sequence[Adapter], base: Sequence[str | None]) -> dict[str, str]:
    """What `Sources` says of the plan that weights carry. Files that are applied speak before the base does."""
    carriers = [(adapter.identity.plan, adapter.path.name) for adapter in (*tuned, *loras)]
    found = [(plan, name) for plan, name in carriers if plan]
    from_lora = found and not any(adapter.identity.plan for adapter in tuned)
    found = found or [(plan, "the base") for plan in base if plan]
    if not found:
        return {}
    plan, name = found[0]
    said = {"plan_json": plan, "plan_from": f"the LoRA {name}" if from_lora else "the weights"}
    other = next((entry for entry in found if entry[0] != plan), None)
    if other:
        said["plan_conflict"] = (
            f"{name} and {other[1]} carry different plans ({Plan.from_json(plan).name!r} and "
            f"{Plan.from_json(other[0]).name!r}): choose one with --plan."
        )
    return said
