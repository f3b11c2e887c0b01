"""What users are told where T3 saves next to nothing, or makes more work than full attention."""

from __future__ import annotations

import logging

import host_models
import pytest
import torch
from host_nodes import defaults, run
from host_runs import forward, plan_of, with_t3

pytest_plugins = ["host_node_fixtures"]
pytestmark = pytest.mark.usefixtures("folders")
LITTLE, MORE = "T3 saves only", "more work a forward pass than full attention"


@pytest.mark.parametrize(
    ("layers", "size", "conds", "words"),
    [
        # A small clip of a small model: most of its work is outside attention.
        ([[1, 2, 3]], (2, 12, 12), {}, LITTLE),
        # Of 3 frames 2 and 1, by both groupings.
        ([[2, 1, 1]], (3, 12, 12), {}, MORE),
        # As many tokens of an image beside the video as its own, attended by both groupings.
        ([[1, 2, 3]], (1, 40, 40), {"context_latents": [torch.zeros(1, 16, 1, 40, 40)]}, MORE),
        ([[1, 8, 8]], (2, 64, 64), {}, None),
    ],
)
def test_the_log_says_so_once(pack, caplog, layers, size, conds, words):
    grid = (size[0], size[1] // 2, size[2] // 2)
    model, _ = with_t3(pack, host_models.patcher("t2v", num_layers=1), custom_plan=plan_of(pack, layers, grid))
    x, text = torch.randn(1, 16, *size), torch.randn(1, 7, 48)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            forward(model, x, text=text, **conds)
    found = [r.getMessage() for r in caplog.records if LITTLE in r.getMessage() or MORE in r.getMessage()]
    assert len(found) == (words is not None)
    if words:
        assert words in found[0] and "Plan dense is full attention" in found[0]
        assert f"grid {' x '.join(map(str, grid))}" in found[0]


def test_the_preview_says_so_before_anything_is_sampled(nodes):
    node = nodes["T3PlanPreview"]
    small = {"width": 832, "height": 480, "frames": 1}
    assert LITTLE in run(node, **{**defaults(node), **small})[1]
    assert LITTLE not in run(node, **{**defaults(node), **small, "plan": "dense"})[1]
    assert LITTLE not in run(node, **defaults(node))[1]
