"""Tests of Triton kernels: on the card where there is one, otherwise in Triton's interpreter on the CPU.

Triton must know that it interprets before it is imported, and knows it for the whole process, compiled code of other
tests included. So without a card these tests skip when they run among others, and `tests/test_kernels.py` runs them in
a process of their own. `pytest tests/kernels` interprets by itself; `TRITON_INTERPRET=1` asks for it on any machine.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_configure(config):
    """Called only where the command line names this folder or something in it."""
    import torch

    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if not torch.cuda.is_available() and all(HERE in (path, *path.parents) for path in named):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device():
    """Where kernels run, `"cuda"` or `"cpu"`. Ask for it before anything imports a kernel."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU: runs in Triton's interpreter, in a process of its own (tests/test_kernels.py)")
    return "cuda"
