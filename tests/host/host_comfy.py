"""ComfyUI in this process, on the CPU, and the pack loaded into it the way ComfyUI loads a pack.

The pack's copy of `t3` and the tests' own are two: compare values, not classes.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from install import COMFYUI, ROOT

PACK = "comfyui_t3_pack"


def available() -> bool:
    """Whether `tests/host/install.py` has been run for this checkout and this Python."""
    return (COMFYUI / "main.py").exists() and importlib.util.find_spec("comfy_kitchen") is not None


@lru_cache(maxsize=1)
def load(tree: Path = COMFYUI, cpu: bool = True) -> ModuleType:
    """Import ComfyUI from `tree` (first on the path: it too has a module `nodes`) and the pack; gives the pack."""
    sys.path.insert(0, str(tree))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu
    # What nodes expect to find imported.
    importlib.import_module("comfy.sd")
    importlib.import_module("nodes")
    pack = load_pack(ROOT, PACK)
    asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())  # imports the modules of all nodes
    return pack


def load_pack(folder: Path, name: str) -> ModuleType:
    """The pack at `folder`, imported as the module `name`."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
