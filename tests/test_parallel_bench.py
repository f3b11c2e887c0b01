"""`benchmarks/parallel_4k.py` in miniature: every row it writes, on two ranks and on one."""

import json

import pytest
from parallel_fixtures import ROOT, ends, start_ranks


@pytest.mark.parametrize("size", [1, 2])
def test_every_row_is_measured(tmp_path, size):
    out = tmp_path / "rows.json"
    program = [ROOT / "benchmarks" / "parallel_4k.py", "--tiny", "--models", "1.3b", "--repeats", "1", "--out", out]
    found = ends(start_ranks(size, *program, "--groups", "1", "2"))
    assert [status for status, _, _ in found] == [0] * size, found[0][2]
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert not [row for row in rows if "failed" in row]
    assert result["machine"]["ranks"] == size
    cases = [row["case"] for row in rows]
    if size == 1:
        assert cases == ["alone"]
    else:
        exchanges = ["exchange to heads", "exchange to tokens", "all-to-all"]
        assert cases == ["alone", "guidance", *["sequence"] * 5, "no exchange", *exchanges]
    for row in rows:
        assert row["seconds"] > 0 and len(row["runs"]) == 1
        if row["case"] in ("sequence", "guidance"):
            assert row["differs"]["rms"] < 1e-5 and row["speed_up"] > 0
        if "gb_per_s" in row:
            # Half of one rank's tokens go to the other.
            assert row["bytes_sent"] == (row["tokens"] + 1) // 2 * 256 * 4 // 2
    # A table for people, with a line for each row.
    assert len([line for line in found[0][1].splitlines() if line.startswith("| 1.3b |")]) == len(rows)
