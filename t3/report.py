"""What a run will do and cost, as plain data and as lines of text. No torch import."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from .cost import ModelShape, activation_bytes, macs_text, model_cost, saving_warning, short
from .memory import shares
from .parallel.split import Split
from .parallel.split import facts as split_facts
from .parallel.split import line as split_line
from .plan import Grid, Plan
from .plan_facts import layer_facts, layer_line
from .sources import Sources

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}
STORED_BYTES = {**BYTES, "fp8": 1}


def run_facts(
    sources: Sources,
    plan: Plan,
    reason: str,
    grid: Grid,
    dtype: str,
    calls: int,
    split: tuple[Split, str] = (Split(), "one process"),
) -> dict[str, Any]:
    """Model, plan, windows, cost and memory of one clip.

    `dtype` is a name from `BYTES`; `calls` is the number of forward passes (steps, twice where guidance is used).
    split: of the work over ranks, and why; memory is that of the rank with most tokens.
    """
    shape = ModelShape.from_config(sources.transformer)
    own = replace(shape, ranks=split[0].sequence)
    tokens = split[0].shares(grid.tokens)[0]
    cost = model_cost(shape, plan, grid, element=BYTES[dtype])
    partitions = plan.partitions(grid, shape.layers)
    cycle = partitions[: len(plan.layers)]
    return {
        "model": {"name": sources.name, "loads": sources.describe(), "parameters": sources.parameters},
        "tuned": sources.tuned,
        "plan": {"name": plan.name, "reason": reason, "definition": json.loads(plan.to_json())},
        "grid": list(grid),
        "tokens": grid.tokens,
        "layers": [layer_facts(i, p, grid, shape.layers, len(plan.layers)) for i, p in enumerate(cycle)],
        "macs": {
            "attention_dense": cost.attention_dense,
            "attention_released": cost.attention_released,
            "attention_t3": cost.attention_t3,
            "other": cost.other,
            "model_dense": cost.model_dense,
            "model_t3": cost.model_t3,
        },
        "forward_passes": calls,
        "flops_of_clip": 2 * cost.model_t3 * calls,
        "memory_bytes": {
            "transformer": sources.parameters * STORED_BYTES[dtype],
            "activations": activation_bytes(own, tokens, element=BYTES[dtype]),
            "activations_lean": activation_bytes(
                own, tokens, element=BYTES[dtype], share=shares(own.own_heads, parts=split[0].sequence == 1)[-1]
            ),
            "dtype": dtype,
        },
        "split": split_facts(*split, grid.tokens),
    }


NOISE_WARNING = (
    "T3 attention on weights that were not tuned for it gives noise. Give T3-tuned weights with --t3-weights, or run "
    "stock weights with --plan dense."
)


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """`run_facts` for people."""
    macs, memory = facts["macs"], facts["memory_bytes"]
    lines = [f"model      {facts['model']['name']}, {facts['model']['parameters'] / 1e9:.2f} billion weights"]
    lines += [f"           {line}" for line in facts["model"]["loads"]]
    lines.append(f"T3-tuned   {facts['tuned']}")
    if warns(facts):
        lines.append(f"           {NOISE_WARNING}")
    lines.append(f"plan       {facts['plan']['name']} ({facts['plan']['reason']})")
    lines.append(f"grid       {' x '.join(map(str, facts['grid']))} = {facts['tokens']:,} tokens")
    lines += [layer_line(layer) + "; layers " + ", ".join(map(str, layer["layers"])) for layer in facts["layers"]]
    lines.append(
        f"attention  {macs_text(macs['attention_t3'])} MACs a forward pass "
        f"(as released {macs_text(macs['attention_released'])}, dense {macs_text(macs['attention_dense'])})"
    )
    lines.append(
        f"model      {macs_text(macs['model_t3'])} MACs a forward pass (dense {macs_text(macs['model_dense'])})"
    )
    if facts["plan"]["name"] != "dense" and (warning := saving_warning(macs["model_dense"], macs["model_t3"])):
        lines.append(f"           {warning}")
    lines.append(f"clip       {facts['forward_passes']} forward passes, {short(facts['flops_of_clip'] / 1e15)} PFLOP")
    lines.append(
        f"memory     {memory['transformer'] / 2**30:.1f} GiB of transformer weights and about "
        f"{memory['activations'] / 2**30:.1f} GiB of activations in {memory['dtype']}, batch 1, or "
        f"{memory['activations_lean'] / 2**30:.1f} GiB with --memory lean; text encoder and VAE beside them, or in "
        "turn with --offload model"
    )
    if facts["split"]["ranks"] > 1:
        lines.append(split_line(facts["split"]))
    return lines


def warns(facts: dict[str, Any]) -> bool:
    """Whether the user must be told that un-tuned weights give noise: windows are used and nothing says "tuned"."""
    return facts["tuned"] == "cannot tell" and any(layer["windows"] > 1 for layer in facts["layers"])
