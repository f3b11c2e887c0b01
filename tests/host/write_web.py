"""Write what the page shows and is made from code: `python tests/host/write_web.py`.

`locales/en/nodeDefs.json` comes from the nodes' schemas, the pictures of the help pages from `t3.preview`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
sys.path[:0] = [path for path in (str(ROOT), str(Path(__file__).parent)) if path not in sys.path]

from help_pictures import PICTURES  # noqa: E402


def schemas(pack: ModuleType) -> dict[str, Any]:
    """The schema of every node of the pack, by node id, in the pack's order."""
    extension = asyncio.run(pack.comfy_entrypoint())
    found = (node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list()))
    return {schema.node_id: schema for schema in found}


def english(pack: ModuleType) -> dict[str, Any]:
    """`nodeDefs.json` in English. Names of inputs stay as they are, since messages name them so."""
    return {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {
                str(number): {"name": output.display_name, "tooltip": output.tooltip}
                for number, output in enumerate(schema.outputs)
            },
        }
        for name, schema in schemas(pack).items()
    }


def as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    import host_comfy

    folder = LOCALES / "en"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodeDefs.json").write_text(as_text(english(host_comfy.load())), encoding="utf-8")
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().quantize(64).save(DOCS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
