"""`t3.bench model`: a forward pass of the whole transformer, in diffusers and, as a subprocess, in ComfyUI."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..backends import AUTO, Situation, choose
from ..cost import model_cost
from ..memory import GIB
from ..plan import Grid, Plan
from .report import Report
from .timing import release
from .transformer import Transformer, diffusers_refusal, grid_of, size_of

TABLE = "model"
FRAMES = 81


def run_model(
    report: Report,
    models: list[str],
    sizes: list[str],
    *,
    backends: list[str],
    memory: list[str | int],
    compiled: bool,
    dense: bool,
) -> None:
    """Rows of each model at each size.

    backends: of rows beside `auto`; memory: what `install_t3` takes as such, a row each; compiled: a row with
    torch.compile; dense: the same model with dense attention, from one layer.
    """
    for name in models:
        if why := diffusers_refusal():
            report.absent(TABLE, name, "all", why)
            report.show(TABLE, name)
            continue
        transformer = Transformer(name, report.device, tiny=report.tiny)
        for size in sizes:
            height, width = size_of(size, report.tiny)
            grid = grid_of(name, (height, width), FRAMES if not report.tiny else 5)
            label = f"{name} {size}: {'x'.join(map(str, grid))} tokens, {transformer.shape.layers} layers"
            if report.over(TABLE, label, "all rows"):
                continue
            _rows(report, transformer, grid, label, backends, memory, compiled, dense)
            report.show(TABLE, label)
        transformer.remove()


def _rows(
    report: Report,
    transformer: Transformer,
    grid: Grid,
    label: str,
    backends: list[str],
    memory: list[str | int],
    compiled: bool,
    dense: bool,
) -> None:
    from ..processor import compile_blocks, install_t3

    plan, model = transformer.plan, transformer.model
    macs = model_cost(transformer.shape, plan, grid).model_t3
    report.run(TABLE, label, "floor", lambda: {"seconds": report.ceilings.floor_ms(macs) / 1e3})

    def with_t3(plan: Plan, **options: Any) -> dict[str, Any]:
        told: list[str] = []
        installed = install_t3(model, plan, say=told.append, **options)
        try:
            return transformer.measure(grid) | ({"told": " ".join(" ".join(told).split())} if told else {})
        finally:
            installed.remove()

    def from_one_layer() -> dict[str, float]:
        installed = install_t3(model, Plan.preset("dense"))
        try:
            return transformer.measure_part(grid, 1)
        finally:
            installed.remove()

    if dense:
        note = "one layer measured, scaled to all, with what is outside the layers"
        report.run(TABLE, label, "dense", from_one_layer, peer=True, note=note)
    report.run(TABLE, label, "T3, auto", lambda: with_t3(plan))
    for backend in backends:
        report.run(TABLE, label, f"T3, {backend}", partial(with_t3, plan, backend=backend))
    for way in memory:
        variant = f"T3, {way}" if isinstance(way, str) else f"T3, attention in {way / GIB:g} GiB"
        report.run(TABLE, label, variant, partial(with_t3, plan, memory=way))

    def with_compile() -> dict[str, float]:
        # As `Engine.load` does: code that is being compiled does not look at measured times.
        windows = plan.window_lengths(grid, len(model.blocks))
        situation = Situation(report.device, transformer.dtype, transformer.shape.head_dim, windows=windows)
        backend, _ = choose(AUTO, situation)
        installed = install_t3(model, plan, backend=backend)
        try:
            compile_blocks(model, plan)
            return transformer.measure(grid)
        finally:
            for block in model.blocks:
                block._compiled_call_impl = None
            installed.remove()
            release(report.device)

    if compiled:
        report.run(TABLE, label, "T3, compiled", with_compile)
