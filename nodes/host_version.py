"""Which ComfyUI this pack was tested with, and what is said about any other."""

from __future__ import annotations

TESTED = "0.30.0"


def remark(running: str) -> str | None:
    """One line about a ComfyUI of version `running`, or None for the tested one."""
    if running == TESTED:
        return None
    return f"T3 was tested with ComfyUI {TESTED}; this is {running}. If something fails, please report both versions."


def running() -> str:
    """The version of the ComfyUI this runs in, or words where it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of an unknown version"
    return __version__
