"""`pytest_plugins = ["host_node_fixtures"]` gives a module `nodes`, by id, and `folders` of its own."""

from __future__ import annotations

import asyncio

import pytest


@pytest.fixture(scope="module")
def nodes(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture
def folders(pack, tmp_path, monkeypatch):
    """Output, input and temporary folders of this test alone."""
    import folder_paths

    made = {}
    for name in ("output", "input", "temp"):
        made[name] = tmp_path / name
        made[name].mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(made[name]))
    return made
