"""The T3 Plan node: windows of the user's own, layer by layer, or a plan's JSON."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io

from ..t3 import Plan
from ..t3.errors import T3Error
from ..t3.plan import EACH, PRESETS
from ..t3.plan_facts import plan_lines
from .types import T3PlanType
from .verdict import verdict

_RELEASED = PRESETS["wan2.1-4k"]


class T3Plan(io.ComfyNode):
    """Makes a plan from text; `t3.plan` checks it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3Plan",
            display_name="T3 Plan",
            category="T3",
            description=(
                "Which windows each layer attends in, for T3 Attention's custom_plan. Weights are tuned for one plan: "
                "with another, expect a worse picture unless you tune for it."
            ),
            search_aliases=["window plan", "partition", "windows per layer", "attention plan"],
            inputs=[
                io.String.Input("name", default="custom", tooltip="What reports call this plan."),
                io.String.Input(
                    "grid",
                    default=" x ".join(map(str, _RELEASED.grid)),
                    tooltip="Tokens along time, height and width of the video the numbers below are for. 4K, 81 "
                    "frames: 21 x 136 x 240 (Wan2.1), 21 x 68 x 120 (Wan2.2 5B). Other sizes get windows of about the "
                    "same size.",
                ),
                io.String.Input(
                    "layers",
                    default="\n".join(" ".join(map(str, layer)) for layer in _RELEASED.layers),
                    multiline=True,
                    tooltip="One layer a line: how many windows along time, height and width. "
                    f'"{EACH}": as many as the video has. The lines repeat over the model\'s layers.',
                ),
                io.String.Input(
                    "plan_json",
                    default="",
                    multiline=True,
                    tooltip="A plan's JSON. If there is any, it is used instead of what stands above.",
                    advanced=True,
                    optional=True,
                ),
            ],
            outputs=[
                T3PlanType.Output("T3_PLAN", display_name="plan", tooltip="For T3 Attention and T3 Plan Preview."),
                io.String.Output(
                    "JSON", display_name="json", tooltip="The plan as JSON, as the command line takes it."
                ),
                io.String.Output(
                    "REPORT", display_name="report", tooltip="Windows and work of each layer on that grid."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, name=None, grid=None, layers=None, plan_json="") -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        over_a_link = plan_json is None or (not plan_json.strip() and None in (name, grid, layers))
        return over_a_link or verdict(read_plan, name, grid, layers, plan_json)

    @classmethod
    def execute(cls, name, grid, layers, plan_json="") -> io.NodeOutput:
        plan = read_plan(name, grid, layers, plan_json)
        return io.NodeOutput(plan, plan.to_json(), "\n".join(plan_lines(plan, plan.grid)))


def read_plan(name: str, grid: str, layers: str, plan_json: str = "") -> Plan:
    """The plan that these texts state. Raises `T3Error` naming what is wrong, where, and the nearest legal value."""
    if plan_json.strip():
        return Plan.from_json(plan_json)
    rows = [line for line in layers.splitlines() if line.strip()]
    entries = tuple(_three(row, f"line {i}") for i, row in enumerate(rows, start=1))
    return Plan(name.strip() or "custom", _three(grid, "the grid"), entries)


def _three(text: str, where: str) -> Any:
    """Three numbers, or `each`, with anything between them; `Plan` checks them."""
    apart = re.sub(r"(?<=\d)\s*[x*]\s*|(?<=each)\s*[x*]\s*", " ", text, flags=re.IGNORECASE)
    words = re.findall(r"[A-Za-z]+|-?[\d.]+", apart)
    if len(words) != 3:
        raise T3Error(f'{where} is {text.strip()!r}; write three numbers for time, height and width, e.g. "1 17 30".')
    return [int(word) if word.isdigit() else _word(word, text, where) for word in words]


def _word(word: str, text: str, where: str) -> str:
    if word.lower() != EACH:
        raise T3Error(f'{where} is {text.strip()!r}; {word!r} is neither a whole number of at least 1 nor "{EACH}".')
    return EACH
