"""`t3.bench growth`: time and memory against tokens, dense beside T3; and the short clips where T3 stops paying."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..backends import choose
from ..cost import activation_bytes, model_cost
from ..memory import GIB, shares
from ..plan import Grid, Partition, Plan
from .attention import fused
from .cases import SMALL, WAN21, Case, LayerInputs
from .paying import SHORT, paying
from .report import Report
from .timing import release, steady
from .transformer import Transformer, diffusers_refusal, grid_of, size_of

TABLE = "growth"
SIZES = ("480p", "720p", "1080p", "1440p", "4k", "8k")
SHORT_SIZES, SHORT_FRAMES = ("480p", "720p", "1080p"), (1, 5, 13, 21)
FRAMES = 81
# Bytes that a layer's attention takes for each element of q: inputs, their random draw, both groupings, results.
_BYTES = 32
LONG_MS = 1000.0  # from here on a run is not repeated
PARTS = (
    "attention: the mean layer of the plan's cycle, from projections; forward: one cycle of layers (dense: one layer) "
    "and what is outside the layers, scaled to the whole model; where not all heads fit the card, some, scaled to all"
)
COMPUTED = "where computed: the square of the tokens times the largest that was measured"


def run_growth(report: Report, sizes: list[str], dense_s: float) -> None:
    """Rows of all sizes and of short clips. dense_s: a dense layer that would take longer is computed."""
    transformer = None
    if why := diffusers_refusal():
        report.absent(TABLE, _label(report), "forward", why)
    else:
        transformer = Transformer("1.3b", report.device, layers=5, tiny=report.tiny)
    growth = _Growth(report, transformer, dense_s)
    for size in sorted(sizes, key=lambda size: _case(report, size, _frames(report)).grid.tokens):
        growth.rows(size)
    report.show(TABLE, _label(report))
    growth.short()
    if transformer is not None:
        transformer.remove()
    print(paying(report.data), flush=True)


def _label(report: Report) -> str:
    return "1.3B, 81 frames" if not report.tiny else "tiny"


def _frames(report: Report) -> int:
    return 5 if report.tiny else FRAMES


def _case(report: Report, size: str, frames: int) -> Case:
    grid = grid_of("1.3b", size_of(size, report.tiny), frames)
    return Case(size, SMALL, grid, 2, 64) if report.tiny else Case(size, WAN21, grid, 12)


class _Growth:
    """Rows of one size after the other, from small to large: what was measured last foretells the next."""

    def __init__(self, report: Report, transformer: Transformer | None, dense_s: float) -> None:
        self.report, self.transformer, self.dense_s = report, transformer, dense_s
        self.last: tuple[int, float] | None = None  # tokens, and milliseconds of a dense layer's attention

    def rows(self, size: str) -> None:
        """A T3 row and a dense one."""
        case, label = _case(self.report, size, _frames(self.report)), _label(self.report)
        common = {"size": size, "tokens": case.grid.tokens}
        t3 = self.report.run(TABLE, label, f"{size}, T3", lambda: common | self._t3(case), note=PARTS) or {}
        self.report.run(TABLE, label, f"{size}, dense", lambda: common | self._dense(case, t3), note=COMPUTED)

    def short(self) -> None:
        """Rows of short clips: their ratios say where T3 stops paying."""
        for size in SHORT_SIZES:
            label = f"1.3B, {size}" if not self.report.tiny else f"tiny, {size}"
            if self.report.over(SHORT, label, "all rows"):
                continue
            for frames in SHORT_FRAMES:
                case = _case(self.report, size, frames)
                known = {"size": size, "frames": frames}
                work = lambda case=case, known=known: known | self._clip(case)  # noqa: E731
                self.report.run(SHORT, label, f"{frames} frames", work, note=PARTS)
            self.report.show(SHORT, label)

    def _clip(self, case: Case) -> dict[str, Any]:
        dense = dense_layer(case, self.report.device)
        t3, _ = t3_layer(case, self.report.device)
        found = {"tokens": case.grid.tokens, "dense_ms": dense, "t3_ms": t3, "dense_over_t3": dense / t3}
        forward_t3 = self._forward(case.grid, case.plan, case.layers).get("forward_s")
        forward_dense = self._forward(case.grid, Plan.preset("dense"), 1).get("forward_s")
        if forward_t3 and forward_dense:
            found |= {"forward_dense_s": forward_dense, "forward_t3_s": forward_t3}
            found["forward_over_t3"] = forward_dense / forward_t3
        if self.transformer is not None:
            cost = model_cost(self.transformer.shape, case.plan, case.grid)
            found["macs_over_t3"] = cost.model_dense / cost.model_t3
        return found | {"dense_layers_of_the_cycle": sum(partition == (1, 1, 1) for partition in case.partitions)}

    def _t3(self, case: Case) -> dict[str, Any]:
        ms, heads = t3_layer(case, self.report.device)
        found = {"mode": "T3", "attention_ms": ms} | ({"heads_measured": heads} if heads < case.heads else {})
        return found | self._forward(case.grid, case.plan, case.layers)

    def _dense(self, case: Case, t3: Mapping[str, Any]) -> dict[str, Any]:
        tokens = case.grid.tokens
        foretold = self.last[1] * (tokens / self.last[0]) ** 2 if self.last else 0.0
        if foretold > self.dense_s * 1e3:
            found = {"mode": "dense", "computed": "yes", "attention_ms": foretold}
            if self.transformer and t3.get("forward_s"):
                # T3's forward with its attention exchanged for dense attention.
                more = self.transformer.shape.layers * (foretold - t3["attention_ms"]) / 1e3
                found["forward_s"] = t3["forward_s"] + more
        else:
            ms = dense_layer(case, self.report.device, warm=foretold < LONG_MS)
            self.last = (tokens, ms)
            found = {"mode": "dense", "attention_ms": ms}
            found |= self._forward(case.grid, Plan.preset("dense"), 1, warm=foretold < LONG_MS)
        for key, what in (("attention_ms", "attention"), ("forward_s", "forward")):
            if found.get(key) and t3.get(key):
                found[f"over_t3_{what}"] = found[key] / t3[key]
        return found

    def _forward(self, grid: Grid, plan: Plan, layers: int, warm: bool = True) -> dict[str, Any]:
        """Of the whole model, from some of its layers; in words why there is none."""
        if self.transformer is None:
            return {}
        from ..processor import install_t3

        installed = install_t3(self.transformer.model, plan)
        try:
            found = self.transformer.measure_part(grid, layers, warm=warm)
        except torch.OutOfMemoryError:
            shape = self.transformer.shape
            needed = activation_bytes(shape, grid.tokens, share=shares(shape.heads)[-1]) / GIB
            return {"forward": f"out of memory: needs at least {needed:.0f} GiB beside the weights"}
        finally:
            installed.remove()
            release(self.report.device)
        peak = {"activations_gib": found["activations_gib"]} if "activations_gib" in found else {}
        return {"forward_s": found["seconds"]} | peak


def t3_layer(case: Case, device: torch.device) -> tuple[float, int]:
    """Milliseconds of the mean layer of the plan's cycle, from the projections; and the heads that were measured."""
    heads = _heads_that_fit(case, device)
    part = Case(case.name, case.plan, case.grid, heads, case.head_dim)
    inputs = LayerInputs(part, device)
    total = 0.0
    for partition in part.partitions:
        work = lambda partition=partition: fused(inputs, partition, "auto")  # noqa: E731
        work()
        total += steady(work, device, 0.2)[1] / part.layers
    return total * case.heads / heads, heads


def dense_layer(case: Case, device: torch.device, *, warm: bool = True) -> float:
    """Milliseconds of a dense layer's attention, from the projections."""
    inputs = LayerInputs(case, device)
    backend, _ = choose("auto", inputs.situation)
    work = lambda: fused(inputs, Partition(1, 1, 1), backend)  # noqa: E731
    if warm:
        work()
    return steady(work, device, 0.2)[1]


def _heads_that_fit(case: Case, device: torch.device) -> int:
    if device.type != "cuda":
        return case.heads
    free, _ = torch.cuda.mem_get_info(device)
    each = _BYTES * case.grid.tokens * case.head_dim
    return max(h for h in range(1, case.heads + 1) if case.heads % h == 0 and (h == 1 or h * each < 0.9 * free))
