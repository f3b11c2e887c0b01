"""`t3.bench attention`: self-attention of a layer, from projected q, k, v to the merged output, over a plan's cycle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..attention import attend_window, t3_attention
from ..backends import BACKENDS, Backend, choose
from ..fused import attention_from_projections
from ..plan import Partition
from ..windows import groupings
from .cases import EPS, Case, LayerInputs
from .exact import exact_tokens, relative_error
from .released import released_attention
from .report import Report
from .timing import steady, with_peak

TABLE = "attention"
# Left out of the rows: it takes one of the others; it builds whole score matrices.
_NOT_A_ROW = ("sdpa", "sdpa-math")
# Measured at every case, beside what `auto` takes; the others at the first case only.
_EVERYWHERE = ("flash-attn-4", "sdpa-flash")
ONE_LAYER = "one layer measured, times the layers of the cycle: all are alike"
Path = Callable[[Partition], torch.Tensor]


def run_attention(report: Report, cases: list[Case]) -> None:
    """Rows of every case, each table printed when its case is done."""
    for number, case in enumerate(cases):
        if report.over(TABLE, case.label, "all rows"):
            continue
        _case_rows(report, LayerInputs(case, report.device), first=number == 0)
        report.show(TABLE, case.label)


def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """As ComfyUI's `apply_rope1` in plain torch. x: `[B, N, heads, head_dim]`; freqs `[1, N, 1, head_dim/2, 2, 2]`."""
    pairs = x.to(freqs.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    out = freqs[..., 0] * pairs[..., 0]
    out.addcmul_(freqs[..., 1], pairs[..., 1])
    return out.reshape(x.shape).type_as(x)


def step_by_step(inputs: LayerInputs, partition: Partition, backend: Backend) -> torch.Tensor:
    """Norm and rotation by torch, then `t3_attention`."""
    q, k, v = inputs.qkv
    heads = inputs.case.heads
    q, k = (
        rotate(F.rms_norm(x, x.shape[-1:], w, EPS).unflatten(-1, (heads, -1)), inputs.freqs)
        for x, w in zip((q, k), inputs.norms, strict=True)
    )
    return t3_attention(q, k, v.unflatten(-1, (heads, -1)), inputs.case.grid, partition, backend=backend).flatten(2)


def fused(inputs: LayerInputs, partition: Partition, backend: Backend | str) -> torch.Tensor:
    """T3's own path: norm, rotation and grouping in one pass."""
    q, k, v = inputs.qkv
    return attention_from_projections(q, k, v, inputs.case.grid, partition, backend=backend, **inputs.around)


def released(inputs: LayerInputs, partition: Partition, backend: Backend) -> torch.Tensor:
    """The released semantics, from the same projections."""
    q, k, v = inputs.qkv
    return released_attention(q, k, v, inputs.case.grid, partition, backend=backend, **inputs.around)


def windows_alone(inputs: LayerInputs, partition: Partition, backend: Backend) -> None:
    """Attention alone in the windows of one grouping, of tensors that were grouped before (here: as they are)."""
    start = 0
    for windows, size in partition.window_classes(inputs.case.grid):
        some = [x[0, start : start + windows * size].unflatten(0, (windows, size)) for x in inputs.heads]
        attend_window(backend, inputs.case.head_dim**-0.5, *some)
        start += windows * size


def usable_backends(inputs: LayerInputs) -> list[Backend]:
    """The exact backends that can be used here; on a CPU the one there is."""
    if inputs.device.type != "cuda":
        return [choose("auto", inputs.situation)[0]]
    return [
        b for b in BACKENDS.values() if b.exact and b.name not in _NOT_A_ROW and b.refusal(inputs.situation) is None
    ]


def _case_rows(report: Report, inputs: LayerInputs, first: bool) -> None:
    case, label = inputs.case, inputs.case.label
    # Of peers' windows, and of one that is the whole grid, nothing is known before they run.
    usual, _ = choose("auto", inputs.situation)
    auto, why = choose("auto", inputs.over(case.partitions))
    taken = [choose("auto", inputs.over([partition]))[0].name for partition in case.partitions]
    usable = usable_backends(inputs)
    for backend in BACKENDS.values():
        if first and backend.exact and backend.name not in _NOT_A_ROW and backend not in usable:
            report.absent(TABLE, label, f"T3, {backend.name}", backend.refusal(inputs.situation) or "")
    if not first:
        usable = [b for b in usable if b in (auto, usual) or b.name in (*taken, *_EVERYWHERE)]
    floor = [report.ceilings.floor_ms(case.layer_macs(layer)) for layer in range(case.layers)]
    report.run(TABLE, label, "floor", lambda: {"layer_ms": floor, "ms": sum(floor)}, note=f"auto takes {why}")

    tokens = inputs.some_tokens()
    exact = [exact_tokens(inputs, partition, tokens) for partition in case.partitions]

    def cycle(path: Path) -> dict[str, Any]:
        """Every layer in turn: milliseconds, the largest peak beyond the inputs, the largest error."""
        ms, errors, peaks = [], [], []
        for partition, truth in zip(case.partitions, exact, strict=True):
            work = lambda partition=partition: path(partition)  # noqa: E731
            work()  # compiles, or has `auto` take its times
            out, peak = with_peak(work, report.device)
            errors.append(relative_error(out[0, tokens], truth))
            peaks.append(peak)
            del out
            ms.append(steady(work, report.device)[1])
        found = {"layer_ms": ms, "ms": sum(ms), "error": max(errors)}
        return found | max(peaks, key=lambda peak: peak.get("peak_gib", 0.0))

    def dense() -> dict[str, Any]:
        work = lambda: fused(inputs, Partition(1, 1, 1), usual)  # noqa: E731
        _, peak = with_peak(work, report.device)
        # The floor is that of windows.
        return {"ms": steady(work, report.device)[1] * case.layers, "percent_of_floor": None} | peak

    report.run(TABLE, label, f"dense, {usual.name}", dense, peer=True, note=ONE_LAYER)
    variant = f"as released, {usual.name}"
    if case.divides:
        report.run(TABLE, label, variant, lambda: cycle(lambda p: released(inputs, p, usual)), peer=True)
    else:
        report.absent(TABLE, label, variant, "the released code needs counts that divide the grid")

    def alone(backend: Backend) -> dict[str, Any]:
        ms = []
        for partition in case.partitions:
            branches = len(groupings(case.grid, partition))
            work = lambda partition=partition: windows_alone(inputs, partition, backend)  # noqa: E731
            work()
            ms.append(branches * steady(work, report.device)[1])
        return {"layer_ms": ms, "ms": sum(ms)}

    for backend in usable:
        report.run(TABLE, label, f"windows alone, {backend.name}", partial(alone, backend))
    for name, how in (("auto", "auto"), *((b.name, b) for b in usable)):
        path = lambda p, how=how: fused(inputs, p, how)  # noqa: E731
        note = f"auto takes, layer by layer: {', '.join(taken)}" if how == "auto" else None
        report.run(TABLE, label, f"T3, {name}", partial(cycle, path), note=note)
    report.run(TABLE, label, f"step by step, {auto.name}", lambda: cycle(lambda p: step_by_step(inputs, p, auto)))
