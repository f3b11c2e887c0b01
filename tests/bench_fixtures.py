"""What tests of the benchmarks share."""

from __future__ import annotations

import pytest
import torch

UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def on_cpu(monkeypatch):
    """As on a machine without a card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
