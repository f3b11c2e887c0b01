"""What the rows of `t3.bench` make of times, with a clock that is known: sums, means, ratios, floors, bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bench_fixtures import UNCOMPILED
from bench_fixtures import on_cpu as on_cpu

from t3.bench import attention, growth, kernels, model, peers, timing
from t3.bench.cases import TINY, LayerInputs
from t3.bench.machine import Ceilings
from t3.bench.report import Report
from t3.cost import ModelShape, model_cost
from t3.plan import Grid, Plan
from t3.weights import known_config
from t3.windows import groupings

CPU = torch.device("cpu")
CASE = TINY[0]
MS = 10.0  # of every run, by the clock of these tests


def steady(work, *_):
    return work(), MS


@pytest.fixture
def report(on_cpu, monkeypatch):
    monkeypatch.setattr("t3.bench.report.measure_ceilings", lambda *_: Ceilings(500.0, 2.0))
    return Report([], tiny=True)


def rows_of(report):
    return {row["variant"]: row for row in report.data["rows"]}


def test_the_median_is_of_runs_after_those_that_warm_up(monkeypatch):
    times = iter([7.0, 1.0, 2.0])
    runs = []
    monkeypatch.setattr(timing, "timed", lambda work, _: (work(), next(times)))
    assert timing.milliseconds(lambda: runs.append(1), CPU, repeats=3, warm=2) == 2.0
    assert len(runs) == 5


def test_layers_of_a_cycle_are_summed_and_both_groupings_counted(report, monkeypatch):
    monkeypatch.setattr(attention, "steady", steady)
    attention._case_rows(report, LayerInputs(CASE, CPU), first=False)
    rows = rows_of(report)
    branches = [len(groupings(CASE.grid, partition)) for partition in CASE.partitions]
    assert set(branches) == {1, 2}
    assert rows["windows alone, sdpa"]["layer_ms"] == [MS * count for count in branches]
    assert rows["windows alone, sdpa"]["ms"] == MS * sum(branches)
    # The dense layer is measured once and stands for all; T3's are each measured.
    assert rows["dense, sdpa"]["ms"] == rows["T3, sdpa"]["ms"] == MS * CASE.layers
    assert rows["T3, sdpa"]["layer_ms"] == [MS] * CASE.layers
    floor = sum(CASE.layer_macs(layer) for layer in range(CASE.layers))
    assert rows["floor"]["ms"] == pytest.approx(2 * floor / 500e12 * 1e3, rel=5e-3)


@UNCOMPILED
def test_peers_are_held_against_the_mean_layer_and_the_dense_floor(report, monkeypatch):
    monkeypatch.setattr(peers, "steady", steady)
    peers.run_peers(report, [CASE])
    dense = {row["variant"]: row for row in report.data["rows"] if row["table"] == peers.DENSE}
    windows = {row["variant"]: row for row in report.data["rows"] if row["table"] == peers.WINDOWS}
    assert dense["T3, mean of its layers"]["ms"] == MS
    assert dense["T3, mean of its layers"]["times_as_fast_as"]["dense, sdpa"] == 1.0
    # Of each head and pair of tokens: a product with a key, and one with a value; two FLOPs each.
    flops = 2 * 2 * CASE.grid.tokens**2 * CASE.width
    assert dense["floor"]["ms"] == pytest.approx(flops / 500e12 * 1e3, rel=5e-3)
    partition = CASE.partitions[-1]
    assert len(groupings(CASE.grid, partition)) == 2
    one = sum(count * size**2 for count, size in partition.window_classes(CASE.grid))
    assert windows["floor"]["ms"] == pytest.approx(2 * 2 * one * CASE.width / 500e12 * 1e3, rel=5e-3)


def test_short_clips_say_how_many_times_as_long_dense_attention_takes(report, monkeypatch):
    monkeypatch.setattr(growth, "dense_layer", lambda *_, **__: 30.0)
    monkeypatch.setattr(growth, "t3_layer", lambda case, _: (10.0, case.heads))
    growing = growth._Growth(report, None, dense_s=8.0)
    forwards = {CASE.layers: 2.0, 1: 5.0}
    monkeypatch.setattr(growing, "_forward", lambda grid, plan, layers, **_: {"forward_s": forwards[layers]})
    found = growing._clip(CASE)
    assert found["dense_over_t3"] == 3.0 and found["forward_over_t3"] == 2.5


def test_heads_that_were_not_measured_are_counted(monkeypatch):
    monkeypatch.setattr(growth, "steady", steady)
    monkeypatch.setattr(growth, "_heads_that_fit", lambda *_: 1)
    assert growth.t3_layer(CASE, CPU) == (pytest.approx(MS * CASE.heads), 1)


def test_the_floor_of_a_forward_is_all_its_multiplications(report):
    report.only = ["none but the floor"]
    shape = ModelShape.from_config(known_config("wan2.1-t2v-1.3b"))
    plan, grid = Plan.preset("wan2.1-4k"), Grid(21, 45, 80)
    transformer = SimpleNamespace(shape=shape, plan=plan, model=None)
    model._rows(report, transformer, grid, "1.3b", [], [], False, True)
    (floor,) = report.data["rows"]
    assert floor["seconds"] == pytest.approx(2 * model_cost(shape, plan, grid).model_t3 / 500e12, rel=5e-3)


def test_passes_around_windows_move_what_they_must(report, monkeypatch):
    """Each tensor once: tokens in and out, and the rotation's table by the 32 bytes a card reads at least."""
    monkeypatch.setattr(kernels, "milliseconds", lambda *_: 1.0)
    inputs = LayerInputs(CASE, CPU)
    assert len(groupings(CASE.grid, CASE.partitions[-1])) == 2
    kernels._rates(report, inputs, lambda *_, **__: None, lambda *_, **__: None)
    moved = {name.partition(";")[0]: row["tb_s"] * 1e9 for name, row in rows_of(report).items() if "tb_s" in row}
    tensor = inputs.qkv[0].numel() * inputs.qkv[0].element_size()
    host = inputs.freqs.numel() * inputs.freqs.element_size()  # two of its four numbers are used
    compact = sum(table.numel() * table.element_size() for table in inputs.turns)
    expected = {
        "q, two groupings": 3 * tensor + host,
        "q, in place of one": 2 * tensor + host,
        "v, two groupings": 3 * tensor,
        "v, one grouping": 2 * tensor,
        "merge": 3 * tensor,
        "q, diffusers' tables": 3 * tensor + 2 * compact,
        "q, compact tables": 3 * tensor + compact,
        "q, norm only": 3 * tensor,
    }
    assert moved == {name: pytest.approx(size, rel=5e-3) for name, size in expected.items()}
    layers = [rows_of(report)[f"layer {layer}, all passes"]["ms"] for layer in range(CASE.layers)]
    # q and k always; v and the merge where there are two groupings.
    assert layers[0] == 2.0 and layers[-1] == 4.0
