"""`t3.bench peers`: other people's attention on the same tokens. What cannot be had here says why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..attention import attend_window
from ..backends import BACKENDS, choose
from ..fused import attention_from_projections
from ..plan import Partition
from ..windows import LOCAL, STRIDED, groupings, window_indices
from .attention import usable_backends
from .cases import Case, LayerInputs
from .exact import attend_exactly, exact_windows, relative_error
from .flex import flex_windows
from .report import Report
from .timing import steady

DENSE, WINDOWS = "dense peers", "window peers"
# Left out: what takes one of the others, what builds whole score matrices, what is never the fastest.
_NOT_DENSE = ("sdpa", "sdpa-math", "sdpa-efficient")
NAMES = ("1.3B 4K",)  # by default
WARM = 4096  # tokens of the run that loads and compiles, before one run of all
SOL = {"tau 1": {"tau": 1.0}, "top 2 %": {"topk_ratio": 0.02}}
OTHER_MATHS = (
    "attends other keys than dense attention: its error is to dense attention, on random data, which has no structure "
    "to find"
)
OWN_TRUTH = "T3 is another function than dense attention: its error is to its own definition"
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def run_peers(report: Report, cases: list[Case]) -> None:
    """One layer's dense attention by each peer beside T3's, and windows by FlexAttention beside ours."""
    for case in cases:
        if report.over(DENSE, case.label, "all rows"):
            continue
        inputs = LayerInputs(case, report.device)
        _dense(report, inputs)
        report.show(DENSE, case.label)
        _windows(report, inputs)
        report.show(WINDOWS, case.label)
        del inputs


def measured(inputs: LayerInputs, attend: Attend, truth: torch.Tensor, tokens: list[int]) -> dict[str, Any]:
    """Milliseconds and error of dense attention of q, k, v as they are; a run on a few tokens goes before."""
    q, k, v = inputs.heads
    attend(*(x[:, :WARM] for x in (q, k, v)))
    out, ms = steady(lambda: attend(q, k, v), inputs.device)
    return {"ms": ms, "error": relative_error(out[0, tokens], truth)}


def sol_refusal() -> str | None:
    """Why comfy-kitchen's `sol_attn` cannot be had, or None."""
    try:
        import comfy_kitchen
    except ImportError as error:
        return f"comfy-kitchen cannot be imported ({error})"
    if not hasattr(comfy_kitchen, "sol_attn"):
        return f"comfy-kitchen {_version('comfy-kitchen')} has no sol_attn; newer releases have"
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _dense(report: Report, inputs: LayerInputs) -> None:
    case, label = inputs.case, inputs.case.label
    q, k, v = inputs.heads
    tokens = inputs.some_tokens()
    scale = case.head_dim**-0.5
    truth = attend_exactly(q[0, tokens], k[0], v[0])
    floor = report.ceilings.floor_ms(2 * case.grid.tokens**2 * case.width)
    report.run(DENSE, label, "floor", lambda: {"ms": floor}, note="of dense attention")
    left_out = _NOT_DENSE if report.device.type == "cuda" else _NOT_DENSE[1:]
    for name, backend in BACKENDS.items():
        if name in left_out:
            continue
        if why := backend.refusal(inputs.situation):
            report.absent(DENSE, label, f"dense, {name}", why)
            continue

        def attend(q, k, v, backend=backend):
            backend.check_keys(k.shape[1])
            return backend.attend(q, k, v, scale)

        report.run(DENSE, label, f"dense, {name}", partial(measured, inputs, attend, truth, tokens), peer=True)
    for name, options in SOL.items():
        variant = f"sol_attn, {name}"
        if why := sol_refusal():
            report.absent(DENSE, label, variant, why)
            continue

        def sol(q, k, v, options=options):
            import comfy_kitchen

            return comfy_kitchen.sol_attn(q, k, v, scale=scale, **options)

        def row(sol=sol) -> dict[str, Any]:
            return measured(inputs, sol, truth, tokens) | {"percent_of_floor": None}

        report.run(DENSE, label, variant, row, peer=True, note=OTHER_MATHS)
    report.run(DENSE, label, "T3, mean of its layers", lambda: _t3_layer(report, inputs, tokens), note=OWN_TRUTH)


def _t3_layer(report: Report, inputs: LayerInputs, tokens: list[int]) -> dict[str, Any]:
    """Windows, grouped and merged, of q, k, v as they are: the mean layer of the plan."""
    case = inputs.case
    q, k, v = inputs.qkv
    heads = [x[0] for x in inputs.heads]
    total, errors, floor = 0.0, [], 0.0
    for layer, partition in enumerate(case.partitions):
        work = lambda at=partition: attention_from_projections(q, k, v, case.grid, at, heads=case.heads)  # noqa: E731
        work()
        out, ms = steady(work, report.device)
        kinds = groupings(case.grid, partition)
        truths = [exact_windows(heads, _classes(inputs, partition, kind), tokens) / len(kinds) for kind in kinds]
        errors.append(relative_error(out[0, tokens], torch.stack(truths).sum(0)))
        total += ms / case.layers
        floor += report.ceilings.floor_ms(case.layer_macs(layer)) / case.layers
    return {"ms": total, "error": max(errors), "percent_of_floor": 100 * floor / total}


def _classes(inputs: LayerInputs, partition: Partition, kind: str) -> tuple[torch.Tensor, ...]:
    return window_indices(tuple(inputs.case.grid), tuple(partition), kind, inputs.device)


def _windows(report: Report, inputs: LayerInputs) -> None:
    """One grouping of the plan's last layer, tokens grouped before: FlexAttention's mask, and windows as a batch."""
    case, label = inputs.case, inputs.case.label
    partition = case.partitions[-1]
    tokens = inputs.some_tokens()
    floor = report.ceilings.floor_ms(case.layer_macs(case.layers - 1) / len(groupings(case.grid, partition)))
    note = f"layer {case.layers - 1}, counts {tuple(partition)}, one grouping, attention alone"
    report.run(WINDOWS, label, "floor", lambda: {"ms": floor}, note=note)
    for kind in (LOCAL, STRIDED):
        classes = _classes(inputs, partition, kind)
        order = torch.cat([index.flatten() for index in classes])
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        q, k, v = (x[:, order] for x in inputs.heads)
        truth = exact_windows([x[0] for x in inputs.heads], classes, tokens)
        at = places[tokens]

        def row(attend: Attend, q=q, k=k, v=v, truth=truth, at=at) -> dict[str, Any]:
            attend(q, k, v)
            out, ms = steady(lambda: attend(q, k, v), report.device)
            return {"ms": ms, "error": relative_error(out[0, at], truth)}

        def flex(classes=classes, row=row) -> dict[str, Any]:
            sizes = torch.cat([torch.full((len(index),), index.shape[1], device=index.device) for index in classes])
            return row(flex_windows(torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)))

        report.run(WINDOWS, label, f"FlexAttention, {kind} windows", flex, peer=True)
        exact = usable_backends(inputs)
        others = [b for b in BACKENDS.values() if not b.exact and b.refusal(inputs.situation) is None]
        if kind == STRIDED:
            exact, others = [choose("auto", inputs.situation)[0]], []
        for backend in (*exact, *others):

            def batch(q, k, v, backend=backend, classes=classes):
                outs, start = [], 0
                for index in classes:
                    some = [x[0, start : start + index.numel()].unflatten(0, index.shape) for x in (q, k, v)]
                    outs.append(attend_window(backend, case.head_dim**-0.5, *some).flatten(0, 1))
                    start += index.numel()
                return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]

            variant = f"windows as a batch, {backend.name}, {kind}"
            report.run(WINDOWS, label, variant, partial(row, batch))
        del q, k, v
