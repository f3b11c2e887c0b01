"""What the benchmarks say of short clips, and which backend the rows of attention are named by."""

from __future__ import annotations

import pytest
import torch
from bench_fixtures import on_cpu as on_cpu

from t3.backends import BACKENDS
from t3.bench import attention, plots
from t3.bench.cases import TINY, LayerInputs
from t3.bench.paying import paying, sentence
from t3.bench.report import Report
from t3.bench.tables import all_tables


def clips(*ratios, size="480p", **more):
    return [
        {"table": "short clips", "case": size, "variant": f"{n}", "size": size, "frames": n, "tokens": 10 * n}
        | {"dense_over_t3": ratio, **more}
        for n, ratio in zip((1, 5, 13, 21), ratios, strict=False)
    ]


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((1.1, 1.2, 2.0, 3.0), "480p: T3's attention is faster at every length measured, from 1 frame on."),
        ((0.5, 0.6, 0.9, 1.0), "480p: T3's attention is not faster at any length measured, up to 21 frames."),
        ((0.5, 0.9, 1.25, 2.0), "480p: T3 pays from 13 frames on (1.25 times as fast); up to 5 frames it does not."),
        ((1.2, 0.9, 0.8, 2.0), "480p: T3 pays from 21 frames on (2.00 times as fast); up to 13 frames it does not."),
    ],
)
def test_where_it_stops_paying_in_words(ratios, words):
    assert sentence("480p", clips(*ratios)[::-1]) == words


def test_the_whole_forward_pass_decides_where_it_was_measured():
    rows = clips(0.5, 0.5, forward_over_t3=1.3)
    assert "forward pass is faster at every length" in sentence("480p", rows)
    del rows[1]["forward_over_t3"]
    assert "attention is not faster" in sentence("480p", rows)


def test_one_table_of_all_sizes(on_cpu):
    data = Report([], tiny=True).data
    assert paying(data) == "" and "stops paying" not in all_tables(data)
    data["rows"] += [*clips(0.5, 2.0, macs_over_t3=1.02), *clips(0.25, size="720p")]
    text = all_tables(data)
    assert "| 480p | 5 | 50 | 2.00 |  | 1.02 |" in text and "| 720p | 1 | 10 | 0.25 |  |  |" in text
    assert "480p: T3 pays from 5 frames on" in text and "720p: T3's attention is not faster" in text
    assert data["tiny"] in text
    labels = {line.get_label() for line in plots._short(data["rows"]).axes[0].lines}
    assert {"480p, attention", "720p, attention"} <= labels


def test_rows_of_attention_are_named_by_what_auto_goes_by(on_cpu, monkeypatch):
    """Where the windows decide otherwise than the order: T3's rows go by the windows, dense attention by the order."""
    asked = []

    def choose(name, situation):
        asked.append(situation.windows)
        taken = ("sdpa-math" if max(situation.windows) > 20 else "sdpa") if situation.windows else "sdpa"
        return BACKENDS[taken], f"{taken}: why"

    monkeypatch.setattr(attention, "choose", choose)
    report, case = Report([], tiny=True), TINY[1]
    attention._case_rows(report, LayerInputs(case, torch.device("cpu")), first=True)
    rows = {row["variant"]: row for row in report.data["rows"]}
    assert {"dense, sdpa", "step by step, sdpa-math"} <= set(rows)
    assert "auto takes sdpa-math" in rows["floor"]["note"]
    layers = ["sdpa-math" if max(p.window_lengths(case.grid)) > 20 else "sdpa" for p in case.partitions]
    assert len(set(layers)) == 2
    assert rows["T3, auto"]["note"] == f"auto takes, layer by layer: {', '.join(layers)}"
    assert tuple(n for p in case.partitions for n in p.window_lengths(case.grid)) in asked
