"""RoPE's tables in compiled code: the host's own, as one operator."""

from __future__ import annotations

import host_models
import pytest
import torch
from host_runs import with_t3

KEY = "diffusion_model.rope_embedder.forward"


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_tables_are_the_host_s_and_one_operator(pack, batch):
    torch._dynamo.reset()
    embedder = host_models.patcher("t2v").model.diffusion_model.rope_embedder
    ids = torch.rand(batch, 35, 3, generator=torch.Generator().manual_seed(0)) * 20
    expected, called = embedder(ids), []

    def backend(graph, example):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    embedder.forward = pack.nodes.rope.T3Rope(embedder, 0, None).forward
    assert torch.equal(embedder(ids), expected)
    assert torch.equal(torch.compile(embedder, fullgraph=True, backend=backend)(ids), expected)
    assert len(called) == 1 and "rope_tables" in called[0]


def test_the_operator_says_what_it_gives(pack):
    torch.library.opcheck(pack.nodes.rope._rope_tables, (torch.rand(2, 9, 3), [4, 6, 6], 10000.0))


def test_the_node_puts_it_there_unless_somebody_else_did(pack):
    model = host_models.patcher("t2v")

    def foreign(ids):
        return ids

    assert pack.nodes.stand_in.is_ours(with_t3(pack, model)[0].object_patches[KEY])
    assert KEY not in model.object_patches
    before = model.clone()
    before.add_object_patch(KEY, foreign)
    assert with_t3(pack, before)[0].object_patches[KEY] is foreign
    whole = model.clone()
    whole.add_object_patch(KEY.removesuffix(".forward"), torch.nn.Identity())
    assert KEY not in with_t3(pack, whole)[0].object_patches
