"""What a plan does on a grid, as plain data and as lines of text. Pure Python, no torch."""

from __future__ import annotations

from typing import Any

from .cost import attention_pairs
from .plan import Grid, Partition, Plan


def layer_facts(first: int, partition: Partition, grid: Grid, layers: int, cycle: int) -> dict[str, Any]:
    """Partition, windows and branches of layer `first` of a cycle, and which of `layers` layers share them."""
    sizes = partition.window_lengths(grid)
    return {
        "layers": list(range(first, layers, cycle)),
        "partition": list(partition),
        "windows": partition.windows,
        "tokens_per_window": sorted({min(sizes), max(sizes)}),
        "branches": 1 if partition.coincides(grid) else 2,
    }


def plan_lines(plan: Plan, grid: Grid) -> list[str]:
    """For people: what `plan` does on `grid`, one line a layer of its cycle, and its share of full attention's work."""
    cycle = len(plan.layers)
    partitions = plan.partitions(grid, cycle)
    lines = [f"grid       {' x '.join(map(str, grid))} = {grid.tokens:,} tokens, plan {plan.name}"]
    lines += [layer_line(layer_facts(i, p, grid, cycle, cycle)) for i, p in enumerate(partitions)]
    share = sum(attention_pairs(grid, p) for p in partitions) / (cycle * grid.tokens**2)
    lines.append(f"attention  {share:.2%} of the work of full attention")
    return lines


def layer_line(layer: dict[str, Any]) -> str:
    """`layer_facts` in a line for people."""
    size = " to ".join(f"{n:,}" for n in layer["tokens_per_window"])
    once = "local and strided" if layer["branches"] == 2 else "one branch, both coincide"
    counts = " x ".join(map(str, layer["partition"]))
    return f"windows    {counts:12} of {size} tokens, {once}"
