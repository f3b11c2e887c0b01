"""Which plan the weights on a model are tuned for, and which one is to be used with them, as the nodes hand it on."""

from __future__ import annotations

from typing import NamedTuple

from ..t3 import Plan
from ..t3.plan import PRESETS

_KEY = "T3"


class PlanOfWeights(NamedTuple):
    """What T3 LoRA Retrofit Loader leaves behind.

    tuned: the plan that the files name, or None where none does; chosen: the one that "auto" takes, which is another
    where the user connected one.
    """

    tuned: Plan | None
    chosen: Plan


def plan_of_weights(model) -> PlanOfWeights | None:
    """What a node before said by `set_plan_of_weights` of the weights on `model`, or None."""
    return model.get_attachment(_KEY)


def set_plan_of_weights(model, plan: PlanOfWeights) -> None:
    """Keep with `model` and its clones what is known of its weights."""
    model.set_attachments(_KEY, plan)


def note_on_mismatch(plan: Plan, tuned: Plan | None) -> list[str]:
    """What to tell the user where windows of `plan` are used with weights tuned for another one."""
    if tuned is None or plan in (PRESETS["dense"], tuned):
        return []
    return [f"The weights are tuned for plan {tuned.name}, another one: expect a worse picture, or noise."]
