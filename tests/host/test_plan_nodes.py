"""T3 Plan and T3 Plan Preview as a user meets them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from host_nodes import defaults, refusal, run

from t3 import Grid, Plan
from t3.attended import token_at
from t3.cost import ModelShape
from t3.preview import draw_plan
from t3.weights import known_config

pytest_plugins = ["host_node_fixtures"]
pytestmark = pytest.mark.usefixtures("folders")


def test_all_are_there_in_order(nodes):
    making = ["T3Attention", "T3RetrofitLoader", "T3Plan", "T3PlanPreview", "T3EmptyLatent", "T3LoadLatent"]
    assert list(nodes) == [*making, "T3VAEDecode", "T3VAEDecodeToVideo", "T3VAEEncode", "T3Extract"]
    for node in nodes.values():
        schema = node.GET_SCHEMA()
        assert schema.category in ("T3", "T3/advanced") and schema.description and schema.search_aliases
        assert schema.display_name.startswith("T3 ")


def test_nothing_needs_thought(nodes):
    """Every input but what is connected, and the files of weights, has a default, and the defaults are legal."""
    decoding = ["samples", "vae"]
    connected = {
        "T3Attention": ["model"],
        "T3RetrofitLoader": ["model", "file"],
        "T3VAEDecode": decoding,
        "T3VAEDecodeToVideo": decoding,
        "T3VAEEncode": ["pixels", "vae"],
        "T3Extract": ["base", "tuned"],
    }
    for name, node in nodes.items():
        required = [i.id for i in node.GET_SCHEMA().inputs if not i.optional and getattr(i, "default", None) is None]
        assert required == connected.get(name, [])


# T3 Plan


def test_the_default_plan_is_the_released_one(nodes):
    plan, text, report = run(nodes["T3Plan"])
    released = Plan.preset("wan2.1-4k")
    assert (tuple(plan.grid), tuple(plan.layers)) == (released.grid, released.layers)
    assert Plan.from_json(text) == Plan("custom", released.grid, released.layers)
    assert "1.37% of the work of full attention" in report and "1 x 17 x 30" in report


@pytest.mark.parametrize(
    ("grid", "layers"),
    [
        ("3 8 9", "each 1 1\n1 2 3"),
        ("3x8x9", "each x 1 x 1\n\n  1x2x3  "),
        ("[3, 8, 9]", '["each", 1, 1],\n[1, 2, 3]'),
        ("(3; 8; 9)", "EACH,1,1\n1, 2, 3,"),
        ("3 X 8 X 9", "EACH x 1 x 1\n1X2X3"),
        ("3 × 8 × 9", "each × 1 × 1\r\n1 × 2 × 3"),
    ],
)
def test_counts_are_read_as_people_write_them(nodes, grid, layers):
    plan, _, _ = run(nodes["T3Plan"], name=" mine ", grid=grid, layers=layers)
    assert plan.name == "mine" and plan.grid == (3, 8, 9)
    assert plan.layers == (("each", 1, 1), (1, 2, 3))


def test_pasted_json_wins(nodes):
    text = Plan("pasted", Grid(3, 8, 9), ((1, 2, 3),)).to_json()
    plan, again, report = run(nodes["T3Plan"], grid="nonsense", plan_json=text)
    assert plan.name == "pasted" and again == text and "plan pasted" in report


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"layers": "1 200 30"}, "layer 0 of plan 'custom': 200 windows along h do not fit"),
        ({"layers": "1 200 30"}, "use 1 to 136. Nearest: 136."),
        ({"layers": "1 17 30\n1 17"}, "line 2 is '1 17'; write three numbers"),
        ({"layers": "1 17 0"}, "axis w, is 0; expected a whole number of at least 1"),
        ({"layers": "1 17 -3"}, "'-3' is neither a whole number of at least 1 nor \"each\""),
        ({"layers": "1 17 1.5"}, "'1.5' is neither"),
        ({"layers": "1 17 all"}, "'all' is neither"),
        ({"layers": " \n "}, "has no layers"),
        ({"grid": "21 136"}, "the grid is '21 136'; write three numbers"),
        ({"grid": "each 1 1"}, "the grid's t is 'each'"),
        ({"plan_json": "{"}, "the plan is not JSON"),
        ({"plan_json": '{"grid": [1, 1, 1]}'}, 'no "t3_plan" field'),
        ({"plan_json": json.dumps({"t3_plan": 1, "grid": [3, 8, 9], "layers": [[4, 1, 1]]})}, "Nearest: 3."),
    ],
)
def test_bad_plans_are_refused_in_one_sentence(nodes, inputs, words):
    assert words in refusal(nodes["T3Plan"], **inputs)


def test_texts_that_come_over_links_are_judged_when_they_are_there(nodes):
    assert nodes["T3Plan"].validate_inputs(name="", grid=None, layers="1 1 1", plan_json="") is True
    assert nodes["T3Plan"].validate_inputs(name="", grid="nonsense", layers="", plan_json=None) is True


# T3 Plan Preview


def test_the_preview_is_the_drawing_as_an_image(nodes):
    grid = Grid(21, 136, 240)
    image, report = run(nodes["T3PlanPreview"])
    assert image.dtype == torch.float32 and image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3
    picture = draw_plan(
        Plan.preset("wan2.1-4k"),
        grid,
        token_at(grid, (0.5, 0.5, 0.5)),
        ModelShape.from_config(known_config("wan2.1-t2v-1.3b")),
        "Wan2.1 1.3B",
        title="3840 x 2176 pixels, 81 frames",
    )
    assert torch.equal((image[0] * 255).round().to(torch.uint8), torch.from_numpy(np.array(picture)))
    assert report.startswith("3840 x 2176 pixels, 81 frames") and "1.37%" in report


def test_the_preview_shows_itself(nodes, folders):
    """No other node is needed to look at it."""
    node = nodes["T3PlanPreview"]
    assert node.GET_SCHEMA().is_output_node
    (shown,) = node.execute(**defaults(node)).ui.as_dict()["images"]
    assert (folders["temp"] / shown["subfolder"] / shown["filename"]).stat().st_size > 0


def test_the_preview_s_inputs_matter(nodes):
    node = nodes["T3PlanPreview"]
    custom, _, _ = run(nodes["T3Plan"], grid="5 8 9", layers="1 2 3\n5 1 1")
    latent, _ = run(nodes["T3EmptyLatent"], family="Wan2.2 5B", size="720p portrait", frames=17)
    plain, _ = run(node)
    _, of_family = run(node, family="Wan2.2 5B")
    assert "plan wan2.2-4k" in of_family and "21 x 68 x 120" in of_family
    _, of_latent = run(node, latent=latent, frames=2, width=7)
    assert "704 x 1280 pixels, 17 frames, for Wan2.2 5B" in of_latent and "5 x 40 x 22" in of_latent
    assert "plan custom" in run(node, custom_plan=custom)[1]
    assert "plan dense" in run(node, plan="dense")[1]
    assert run(node, layer=3)[0].shape[1] < plain.shape[1]
    for changed in ("token_time", "token_height", "token_width"):
        assert not torch.equal(run(node, **{changed: 0.0})[0], plain)
    assert "832 x 480 pixels, 5 frames" in run(node, width=832, height=480, frames=5)[1]


def test_odd_latents_are_padded_as_the_model_pads_them(nodes):
    _, report = run(nodes["T3PlanPreview"], latent={"samples": torch.zeros(1, 16, 3, 11, 13)})
    assert "3 x 6 x 7 = 126 tokens" in report


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 16, 64, 64), (1, 32, 3, 8, 8)])
def test_other_latents_are_refused_in_one_sentence(nodes, shape):
    with pytest.raises(ValueError, match="Wan's are batch x 16 or 48 channels") as caught:
        run(nodes["T3PlanPreview"], latent={"samples": torch.zeros(shape)})
    assert "\n" not in str(caught.value)
