"""`benchmarks/parallel_4k.py` and `parallel_profile.py` in miniature: every row they write."""

import json

import pytest
from parallel_fixtures import ROOT, ends, start_ranks


@pytest.mark.parametrize("size", [1, 2])
def test_every_row_is_measured(tmp_path, size):
    out = tmp_path / "rows.json"
    program = [ROOT / "benchmarks" / "parallel_4k.py", "--tiny", "--models", "1.3b", "--repeats", "1", "--out", out]
    found = ends(start_ranks(size, *program, "--groups", "1", "--parts", "1", "2"))
    assert [status for status, _, _ in found] == [0] * size, found[0][2]
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert not [row for row in rows if "failed" in row]
    assert result["machine"]["ranks"] == size
    cases = [row["case"] for row in rows]
    exchanges = ["exchange", "exchange", "all-to-all"]
    assert cases == (["alone"] if size == 1 else ["alone", "sequence", "sequence", *exchanges, "sequence", "guidance"])
    for row in rows:
        assert row["seconds"] > 0 and len(row["runs"]) == 1
        if row["case"] in ("sequence", "guidance"):
            assert row["differs"]["rms"] < 1e-5 and row["speed_up"] > 0
        if "gb_per_s" in row:
            # Half of one rank's tokens go to the other.
            assert row["bytes_sent"] == row["tensors"] * ((row["tokens"] + 1) // 2 * 256 * 4 // 2)
    # A table for people, with a line for each row.
    assert len([line for line in found[0][1].splitlines() if line.startswith("| 1.3b |")]) == len(rows)


def test_no_row_is_begun_that_would_end_too_late(tmp_path):
    out = tmp_path / "rows.json"
    program = [ROOT / "benchmarks" / "parallel_4k.py", "--tiny", "--models", "1.3b", "--seconds", "0", "--out", out]
    ((status, _, err),) = ends(start_ranks(1, *program))
    assert status == 0, err
    result = json.loads(out.read_text(encoding="utf-8"))
    assert not result["rows"] and result["left_out"] == 1


def test_the_profile_tells_every_part_of_every_layer(tmp_path):
    out = tmp_path / "profile.json"
    program = [ROOT / "benchmarks" / "parallel_profile.py", "--tiny", "--parts", "2", "--groups", "--out", out]
    found = ends(start_ranks(2, *program))
    assert [status for status, _, _ in found] == [0, 0], found[0][2]
    one, two = json.loads(out.read_text(encoding="utf-8"))["rows"]
    every = {"norms and sums", "q, k, v projections", "norm, RoPE, group or pack", "attention", "output projection"}
    every |= {"cross-attention", "feed-forward", "other"}
    sent = {"pack v", "exchange to heads", "exchange back", "unpack"}
    for row, expected in ((one, every), (two, every | sent)):
        for rank in row["of_each_rank"]:
            assert set(rank) == {"outside the layers", "0", "1", "2", "3", "4"}
            assert all(expected == set(parts) for layer, parts in rank.items() if layer.isdecimal())
            # Each moment is one part's: together they are the forward whose time was taken, not more.
            total = sum(ms for parts in rank.values() for ms in parts.values())
            assert 0 < total <= row["with_events_ms"] * len(row["of_each_rank"])
    assert two["lost_sum_ms"] == pytest.approx(sum(two["lost_ms"].values()), abs=0.01)
