"""The engine on two ranks against one, for every kind of model: what diffusers' pipelines ask for, and when."""

import pytest
from parallel_engine import CASES
from parallel_fixtures import TESTS, ends, start_ranks


@pytest.mark.slow
def test_two_ranks_sample_what_one_samples(tmp_path):
    for status, out, err in ends(start_ranks(2, TESTS / "parallel_engine.py", tmp_path, *CASES), 300):
        assert status == 0, err[-3000:]
        assert [line for line in out.splitlines() if line.endswith(": equal")] == [f"{name}: equal" for name in CASES]
