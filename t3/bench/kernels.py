"""`t3.bench kernels`: the passes around the windows against the copy bandwidth, and checks of them at full size."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.window_group.naive import window_group as plain_window_group
from ..windows import token_rows
from .cases import EPS, Case, LayerInputs
from .report import Report
from .timing import milliseconds

TABLE, CHECKS = "kernels", "kernel checks"
# Warps and tokens of a program.
CHOICES = ((2, 1), (4, 1), (1, 1), (8, 1), (1, 4), (4, 4))


def run_kernels(report: Report, cases: list[Case]) -> None:
    """Rows of each case. Needs Triton and a card, or Triton's interpreter (`TRITON_INTERPRET=1`)."""
    for case in cases:
        if not report.over(TABLE, case.label, "all rows"):
            _case(report, case)


def _case(report: Report, case: Case) -> None:
    try:
        from ..kernels.window_group import kernel as group
        from ..kernels.window_merge import kernel as merge
    except ImportError as error:
        _none(report, case, f"Triton is not installed ({error})")
        return
    if report.device.type != "cuda" and not (report.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        _none(report, case, "needs a card; on a CPU use --tiny with TRITON_INTERPRET=1")
        return
    inputs = LayerInputs(case, report.device)
    _rates(report, inputs, group.window_group, merge.window_merge)
    report.show(TABLE, case.label)
    del inputs
    _checks(report, case, group.window_group, merge.window_merge)
    report.show(CHECKS, case.label)


def _none(report: Report, case: Case, why: str) -> None:
    report.absent(TABLE, case.label, "all", why)
    report.show(TABLE, case.label)


def _rates(report: Report, inputs: LayerInputs, group: Callable, merge: Callable) -> None:
    """Each pass under each choice of warps and tokens of a program, then all passes of each layer."""
    case, device = inputs.case, report.device
    row = case.grid.tokens * case.width * inputs.dtype.itemsize
    turn = case.grid.tokens * case.head_dim * 8  # a pair's four float32, of which two are used, fill whole sectors
    x, weight, turns = inputs.qkv[0], inputs.norms[0], inputs.turns
    moved = list(token_rows(tuple(case.grid), tuple(case.partitions[-1]), 1, device))
    parts = [torch.randn_like(x[0]) for _ in range(2)]
    compact = tuple(table.contiguous() for table in turns)
    diffusers = tuple(table.repeat_interleave(2, dim=-1)[..., ::2] for table in turns)
    works: dict[str, tuple[int, Callable]] = {
        "q, two groupings": (3 * row + turn, lambda **how: group(x, moved, weight, EPS, *turns, **how)),
        "q, in place of one": (2 * row + turn, lambda **how: group(x, [None], weight, EPS, *turns, **how)),
        "v, two groupings": (3 * row, lambda **how: group(x, moved, **how)),
        "v, one grouping": (2 * row, lambda **how: group(x, moved[1:], **how)),
        "merge": (3 * row, lambda **how: merge(parts, moved, 1, **how)),
        "q, diffusers' tables": (3 * row + turn, lambda **how: group(x, moved, weight, EPS, *diffusers, **how)),
        "q, compact tables": (3 * row + turn // 2, lambda **how: group(x, moved, weight, EPS, *compact, **how)),
        "q, norm only": (3 * row, lambda **how: group(x, moved, weight, EPS, **how)),
    }
    choices, runs, warm = (CHOICES, 7, 2) if device.type == "cuda" else (((4, 3),), 1, 0)
    for name, (size, work) in works.items():
        few = "table" in name or "only" in name  # each choice is a compilation
        for warps, tokens in choices[:2] if few else choices:

            def rate(work=work, size=size, warps=warps, tokens=tokens) -> dict[str, float]:
                ms = milliseconds(lambda: work(warps=warps, tokens=tokens), device, runs, warm)
                tb_s = size / ms / 1e9
                return {"ms": ms, "tb_s": tb_s, "percent_of_copy": 100 * tb_s / report.ceilings.copy_tb_s}

            report.run(TABLE, case.label, f"{name}; {warps} warps, {tokens} tokens", rate)
    for layer, partition in enumerate(case.partitions):
        at = list(token_rows(tuple(case.grid), tuple(partition), 1, device))

        def passes(at=at) -> dict[str, float]:
            moved_at = [one for one in at if one is not None]
            q = milliseconds(lambda: group(x, at, weight, EPS, *turns), device, runs, warm)
            v = milliseconds(lambda: group(x, moved_at), device, runs, warm) if moved_at else 0.0
            merged = milliseconds(lambda: merge(parts, at, 1), device, runs, warm) if len(at) == 2 else 0.0
            return {"ms": 2 * q + v + merged, "q_ms": q, "v_ms": v, "merge_ms": merged}

        report.run(TABLE, case.label, f"layer {layer}, all passes", passes)


def _checks(report: Report, case: Case, group: Callable, merge: Callable) -> None:
    """What tests cannot show at small sizes: offsets beyond 2^31, every row written, runs equal bit for bit."""
    device, n, width = report.device, case.grid.tokens, case.width
    batch = 3 if device.type == "cuda" else 2
    held: dict[str, Any] = {}

    def grouped() -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(2)
        # One slice of a fused projection: rows lie three widths apart.
        x = torch.empty(batch, n, 3 * width, dtype=torch.bfloat16, device=device)
        for sample in x:
            sample.normal_(generator=generator)
        x = x[..., width : 2 * width]
        weight = torch.ones(width, device=device)
        angle = torch.randn(1, n, case.head_dim // 2, device=device, generator=generator)
        arguments = (weight, EPS, angle.cos(), angle.sin())
        at = list(token_rows(tuple(case.grid), tuple(case.partitions[-1]), batch, device))
        outs, poisoned = _poisoned(lambda: group(x, at, *arguments), device)
        some = torch.randint(0, n, (min(n, 4096),), device=device, generator=generator)
        some[0] = n - 1
        turns = (angle.cos()[:, some], angle.sin()[:, some])
        (exact,) = plain_window_group(x[-1:, some].double(), [None], weight, EPS, *turns)
        errors = [
            ((out[to[-1, some].long()].double() - exact).norm() / exact.norm()).item()
            for out, to in zip(outs, at, strict=True)
        ]
        held.update(outs=outs, at=at, some=some)
        return {
            "elements_read_over": (batch - 1) * x.stride(0) + n * x.stride(1),
            "elements_written": batch * n * width,
            "new_memory_is_nan": poisoned,
            "every_row_written": all(_finite(out) for out in outs),
            "error": max(errors),
            "second_run_bit_equal": all(map(torch.equal, outs, group(x, at, *arguments))),
        }

    def merged() -> dict[str, Any]:
        outs, at, some = held["outs"], held["at"], held["some"]
        out, poisoned = _poisoned(lambda: merge(outs, at, batch), device)
        expected = (outs[0][at[0][-1, some].long()] + outs[1][at[1][-1, some].long()]) / 2
        return {
            "elements_written": batch * n * width,
            "new_memory_is_nan": poisoned,
            "every_row_written": _finite(out),
            "equals_torch": bool(torch.equal(out[-1, some], expected)),
            "second_run_bit_equal": bool(torch.equal(out, merge(outs, at, batch))),
        }

    note = "errors are of tokens of the last sample, whose offsets are the largest"
    report.run(CHECKS, case.label, f"group, batch {batch}", grouped, note=note)
    if held:
        report.run(CHECKS, case.label, f"merge, batch {batch}", merged)
    held.clear()


def _poisoned(work: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
    """The result of `work` where new memory is full of NaN, and whether it was."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return work(), bool(torch.empty(1000, device=device).isnan().all())
    finally:
        torch.use_deterministic_algorithms(before)


def _finite(y: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in y.chunk(8))
