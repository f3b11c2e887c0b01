"""Rules that keep the pack working inside ComfyUI and out of it, where a module called `nodes` exists already."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
OWN = {"t3", "nodes", "tests"}


def imported(path):
    """`(level, first word of the module)` of every import in a file, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, (node.module or "").split(".")[0]


def sources(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", sources("t3"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_knows_no_host(path):
    absolute = {name for level, name in imported(path) if level == 0}
    assert not absolute & (HOST | OWN)


@pytest.mark.parametrize(
    "path", [ROOT / "__init__.py", *sources("nodes")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_pack_imports_its_own_parts_relatively(path):
    absolute = {name for level, name in imported(path) if level == 0}
    assert not absolute & OWN


def test_the_entry_point_offers_v3_nodes_only():
    """ComfyUI drops V3 nodes in silence where the old mapping exists too."""
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [ROOT / "__init__.py", *sources("nodes")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_importing_the_pack_only_imports(path):
    """No call, loop or file is there to run when ComfyUI starts; names and classes are made, nothing else."""
    made = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, made) or docstring, f"line {node.lineno}"
