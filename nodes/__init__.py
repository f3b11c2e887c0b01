"""Everything that knows ComfyUI: the list of nodes this pack offers."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention import T3Attention


class T3Extension(ComfyExtension):
    """The pack's nodes, in the order ComfyUI lists them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [T3Attention]


async def comfy_entrypoint() -> T3Extension:
    """Called once by ComfyUI when it loads the pack."""
    return T3Extension()
