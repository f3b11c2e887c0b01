"""The pack in ComfyUI: it loads, and offers its nodes."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from install import ROOT


def test_the_pack_offers_its_nodes(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    ids = [node.GET_SCHEMA().node_id for node in nodes]
    assert len(set(ids)) == len(ids) > 0
    assert all(name.startswith("T3") for name in ids)


def test_every_row_of_the_composition_table_is_a_test():
    """Names in backticks in the last column are functions of the test module."""
    import test_composition

    text = (ROOT / "docs/comfyui.md").read_text(encoding="utf-8")
    named = re.findall(r"\| `(\w+)` \|$", text.split("## Wan variants")[0], flags=re.MULTILINE)
    assert len(named) >= 18
    missing = [name for name in named if not hasattr(test_composition, name)]
    assert not missing
    assert {other.__name__ for other in test_composition.OTHERS} <= set(named)


@pytest.mark.parametrize(("version", "lines"), [("0.30.0", 0), ("0.31.2", 1), ("of an unknown version", 1)])
def test_an_untested_host_gets_one_line(pack, monkeypatch, caplog, version, lines):
    monkeypatch.setattr(pack.nodes.host_version, "running", lambda: version)
    with caplog.at_level(logging.WARNING):
        asyncio.run(pack.comfy_entrypoint())
    assert len(caplog.records) == lines
    assert all(version in record.message for record in caplog.records)


def test_an_older_host_that_lacks_something_gets_one_line(pack, monkeypatch, caplog):
    """No nodes then, but no traceback either, and the rest of ComfyUI starts."""
    monkeypatch.setitem(sys.modules, f"{pack.__name__}.nodes.attention", None)
    extension = asyncio.run(pack.comfy_entrypoint())
    with caplog.at_level(logging.ERROR):
        assert asyncio.run(extension.get_node_list()) == []
    assert len(caplog.records) == 1 and "0.30.0" in caplog.records[0].message


def test_shipped_names_stay(pack):
    """Graphs hold node ids, input names and the order of inputs: all shipped ones stay, new inputs come last."""
    shipped = json.loads((Path(__file__).parent / "shipped_nodes.json").read_text())
    nodes = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(nodes_of(pack))}
    for name, inputs in shipped.items():
        assert name in nodes, f"{name} was shipped: keep it, or register a replacement with the host"
        assert [i.id for i in nodes[name].inputs][: len(inputs)] == inputs


async def nodes_of(pack):
    return await (await pack.comfy_entrypoint()).get_node_list()


def test_registry_metadata():
    """What the ComfyUI registry reads: the icon is there, and the versions agree."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert (ROOT / comfy["Icon"]).exists()
    assert comfy["requires-comfyui"].startswith(">=")
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["project"]["name"])
    assert f'__version__ = "{project["project"]["version"]}"' in (ROOT / "t3/__init__.py").read_text(encoding="utf-8")
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not any(line.lower().startswith("torch") for line in lines), "never replace the user's torch"


def test_a_comfyui_user_needs_nothing_but_requirements_txt():
    """The pack loads with all nodes where what only the command line needs is not installed."""
    code = (
        "import sys\n"
        "for name in ('diffusers', 'accelerate', 'ftfy', 'peft', 'triton', 'hypothesis'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import asyncio, host_comfy\n"
        "pack = host_comfy.load()\n"
        "nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())\n"
        "print([node.GET_SCHEMA().node_id for node in nodes])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shipped = json.loads((Path(__file__).parent / "shipped_nodes.json").read_text())
    assert set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1])) >= set(shipped)
