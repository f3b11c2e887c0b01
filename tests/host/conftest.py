"""Fixtures of the tests that need the real ComfyUI; they are skipped where `tests/host/install.py` has not been run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import host_blocks
import host_comfy
import host_models
import pytest


@pytest.fixture(scope="session")
def pack():
    """The pack, loaded into a ComfyUI in this process. `pack.nodes.attention` and so on are its modules."""
    if not host_comfy.available():
        pytest.skip("ComfyUI is not installed: run `python tests/host/install.py`")
    return host_comfy.load()


@pytest.fixture
def t3(pack, monkeypatch):
    """The pack's own modules, with chunks of 32 tokens for the blocks of `host_blocks`."""
    names = ("memory", "chunks", "fused", "feed_forward", "text_attention")
    parts = {name: sys.modules[f"{pack.__name__}.t3.{name}"] for name in names}
    monkeypatch.setattr(parts["chunks"], "TILE", 16)
    monkeypatch.setattr(parts["memory"], "CHUNK_BYTES", 32 * host_blocks.FFN * 8)
    # The host's rotation takes no float64.
    for module in ("comfy.ldm.flux.math", "comfy.ldm.wan.model"):
        monkeypatch.setattr(f"{module}.apply_rope1", host_models.rotate)
    return SimpleNamespace(**parts, pack=pack, nodes=pack.nodes)
