"""The folder for what is made once on a machine and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`T3_CACHE`, or `.cache/t3` in the home folder; it need not exist yet."""
    return Path(os.environ.get("T3_CACHE") or Path.home() / ".cache" / "t3")
