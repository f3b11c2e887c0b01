"""The one running ComfyUI that test modules share: `pytest_plugins = ["host_fixtures"]` gives them `host`."""

from __future__ import annotations

import shutil

import host_comfy
import host_standins
import pytest
from host_server import HostServer
from install import COMFYUI


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """A server with the pack as a symbolic link, small random models, and the `example.png` that ComfyUI brings."""
    if not host_comfy.available():
        pytest.skip("ComfyUI is not installed: run `python tests/host/install.py`")
    base = tmp_path_factory.mktemp("comfyui")
    server = HostServer(base, models=host_standins.folder())
    shutil.copy(COMFYUI / "input" / "example.png", base / "input")
    with server:
        yield server
