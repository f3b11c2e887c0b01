"""Fixtures of the tests that need the real ComfyUI; they are skipped where `tests/host/install.py` has not been run."""

from __future__ import annotations

import host_comfy
import pytest


@pytest.fixture(scope="session")
def pack():
    """The pack, loaded into a ComfyUI in this process. `pack.nodes.attention` and so on are its modules."""
    if not host_comfy.available():
        pytest.skip("ComfyUI is not installed: run `python tests/host/install.py`")
    return host_comfy.load()
