"""The full-size checks of `t3.bench kernels`, at a small size: that they pass, and that they can fail."""

from __future__ import annotations

import pytest
import torch

from t3.bench.cases import Case
from t3.plan import Grid, Layer, Plan

CASE = Case("few", Plan("few", Grid(1, 4, 6), (Layer(1, 2, 2),)), Grid(1, 4, 6), 1, 64)


@pytest.fixture
def checked(device, monkeypatch):
    """Runs the checks with given kernels; the rows by name."""
    from t3.bench import kernels, report
    from t3.bench.machine import Ceilings

    monkeypatch.setattr(report, "measure_ceilings", lambda *_: Ceilings(1.0, 1.0))
    monkeypatch.setattr(report, "pick_device", lambda: torch.device(device))

    def run(group, merge):
        found = report.Report(["kernels"], tiny=True)
        kernels._checks(found, CASE, group, merge)
        return [row for row in found.data["rows"] if "failed" not in row]

    return run


def test_the_kernels_pass(device, checked):
    from t3.kernels.window_group.kernel import window_group
    from t3.kernels.window_merge.kernel import window_merge

    grouped, merged = checked(window_group, window_merge)
    assert grouped["new_memory_is_nan"] and grouped["every_row_written"] and grouped["second_run_bit_equal"]
    # Two roundings to bfloat16, which the interpreter cuts off.
    assert 0 < grouped["error"] < 2.0**-7
    assert merged["every_row_written"] and merged["equals_torch"] and merged["second_run_bit_equal"]


def test_a_row_that_is_not_written_is_found(device, checked):
    from t3.kernels.window_group.naive import window_group
    from t3.kernels.window_merge.naive import window_merge

    def forgets(x, rows, *arguments):
        outs = window_group(x, rows, *arguments)
        for out in outs:
            out[5] = torch.empty_like(out[5])
        return outs

    grouped, _ = checked(forgets, window_merge)
    assert grouped["new_memory_is_nan"] and not grouped["every_row_written"]
