"""The pack in ComfyUI: it loads, and offers its nodes."""

import asyncio


def test_the_pack_offers_its_nodes(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    ids = [node.GET_SCHEMA().node_id for node in nodes]
    assert len(set(ids)) == len(ids) > 0
    assert all(name.startswith("T3") for name in ids)
