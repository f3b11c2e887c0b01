"""Several ranks against one: each split and their products, even and odd grids, every kind of model."""

import pytest
from parallel_equal import CASES
from parallel_fixtures import TESTS, ends, start_ranks


@pytest.mark.slow
@pytest.mark.parametrize("size", sorted({case.split.size for case in CASES.values()}))
def test_ranks_compute_what_one_computes(size):
    names = [name for name, case in CASES.items() if case.split.size == size]
    assert names
    for status, out, err in ends(start_ranks(size, TESTS / "parallel_equal.py", *names)):
        assert status == 0, err
        assert out.splitlines() == [f"{name}: equal" for name in names]
