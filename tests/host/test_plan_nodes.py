"""T3 Plan, T3 Plan Preview, T3 Empty Latent and T3 Load Latent as a user meets them."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re

import numpy as np
import pytest
import torch

from t3 import Grid, Plan
from t3.attended import token_at
from t3.cost import ModelShape
from t3.preview import draw_plan
from t3.weights import known_config


@pytest.fixture(scope="module")
def nodes(pack):
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture(autouse=True)
def folders(pack, tmp_path, monkeypatch):
    """Output, input and temporary folders of this test alone."""
    import folder_paths

    made = {}
    for name in ("output", "input", "temp"):
        made[name] = tmp_path / name
        made[name].mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(made[name]))
    return made


def defaults(node):
    return {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}


def run(node, **inputs):
    """Validate as the host does, with the arguments the node asks for, then execute with defaults filled in."""
    values = {**defaults(node), **inputs}
    asked = inspect.getfullargspec(node.validate_inputs).args[1:]
    linked = {"custom_plan", "latent"} if node.GET_SCHEMA().node_id == "T3PlanPreview" else set()
    given = {name: None if name in linked else values[name] for name in asked if name in values}
    verdict = node.validate_inputs(**given)
    assert verdict is True, verdict
    return node.execute(**values).result


def refusal(node, **inputs):
    """What is said about bad widget values before anything runs: one sentence."""
    values = {**defaults(node), **inputs}
    asked = inspect.getfullargspec(node.validate_inputs).args[1:]
    sentence = node.validate_inputs(**{name: values[name] for name in asked if name in values})
    assert isinstance(sentence, str) and "\n" not in sentence and sentence.endswith((".", "'"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        node.execute(**values)
    return sentence


def test_all_are_there_in_order(nodes):
    assert list(nodes) == ["T3Attention", "T3Plan", "T3PlanPreview", "T3EmptyLatent", "T3LoadLatent"]
    for node in nodes.values():
        schema = node.GET_SCHEMA()
        assert schema.category == "T3" and schema.description and schema.search_aliases
        assert schema.display_name.startswith("T3 ")


def test_nothing_needs_thought(nodes):
    """Every input but a model has a default, and the defaults are legal."""
    for name, node in nodes.items():
        required = [i.id for i in node.GET_SCHEMA().inputs if not i.optional and getattr(i, "default", None) is None]
        assert required == (["model"] if name == "T3Attention" else [])


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


# T3 Empty Latent

ALL_SIZES = [f"{name} {way}" for name in ("4K", "1440p", "1080p", "720p") for way in ("landscape", "portrait")]
FAMILIES = ["Wan2.1, Wan2.2 14B", "Wan2.2 5B"]


def test_choices_are_those_that_workflows_hold(nodes):
    inputs = {i.id: i for i in nodes["T3EmptyLatent"].GET_SCHEMA().inputs}
    assert list(inputs) == ["size", "family", "frames", "batch_size", "width", "height"]
    assert inputs["size"].options == ALL_SIZES and inputs["family"].options == FAMILIES
    assert defaults(nodes["T3EmptyLatent"])["frames"] == 81


@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_those_of_the_host_s_own_nodes(nodes, size, family):
    from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
    from comfy_extras.nodes_wan import Wan22ImageToVideoLatent

    latent, report = run(nodes["T3EmptyLatent"], size=size, family=family, frames=9)
    width, height = map(int, re.match(r"(\d+) x (\d+) pixels, 9 frames", report).groups())
    if family == "Wan2.2 5B":
        host = Wan22ImageToVideoLatent.execute(None, width, height, 9, 1).result[0]
        assert width % 32 == height % 32 == 0
    else:
        host = EmptyHunyuanLatentVideo.execute(width, height, 9, 1).result[0]
        assert latent["downscale_ratio_spacial"] == host["downscale_ratio_spacial"]
    assert latent["samples"].shape == host["samples"].shape
    assert latent["samples"].dtype == host["samples"].dtype and latent["samples"].device == host["samples"].device
    assert not latent["samples"].any()
    assert (width > height) == ("landscape" in size)


@pytest.mark.parametrize(
    ("size", "family", "pixels"),
    [
        ("4K landscape", FAMILIES[0], (3840, 2176)),
        ("4K portrait", FAMILIES[1], (2176, 3840)),
        ("1440p landscape", FAMILIES[1], (2560, 1440)),
        ("1080p landscape", FAMILIES[0], (1920, 1088)),
        ("720p landscape", FAMILIES[0], (1280, 720)),
        ("720p landscape", FAMILIES[1], (1280, 704)),
        ("720p portrait", FAMILIES[1], (704, 1280)),
    ],
)
def test_sizes_in_pixels(nodes, size, family, pixels):
    _, report = run(nodes["T3EmptyLatent"], size=size, family=family, frames=1)
    assert report.startswith(f"{pixels[0]} x {pixels[1]} pixels, 1 frame;")


def test_pixels_and_batch(nodes):
    latent, report = run(nodes["T3EmptyLatent"], width=832, height=480, frames=5, batch_size=3)
    assert latent["samples"].shape == (3, 16, 2, 60, 104)
    assert run(nodes["T3EmptyLatent"], height=480, frames=1)[1].startswith("3840 x 480 pixels")
    assert "of the work of full attention" in report and "2 x 30 x 52 = 3,120 tokens" in report


def test_the_host_gives_the_latents_to_a_model_of_the_family_untouched(nodes):
    """The key the latents carry must not make the host rescale them."""
    import comfy.latent_formats
    import comfy.sample

    class Model:
        def __init__(self, latent_format):
            self.latent_format = latent_format

        def get_model_object(self, name):
            return self.latent_format

    for family, format_ in zip(FAMILIES, (comfy.latent_formats.Wan21(), comfy.latent_formats.Wan22()), strict=True):
        latent, _ = run(nodes["T3EmptyLatent"], family=family, width=128, height=64, frames=5)
        fixed = comfy.sample.fix_empty_latent_channels(
            Model(format_), latent["samples"], latent["downscale_ratio_spacial"]
        )
        assert fixed.shape == latent["samples"].shape


@pytest.mark.parametrize("name", ["T3EmptyLatent", "T3PlanPreview"])
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"width": 1000}, "width is 1000; this model needs a multiple of 16 pixels. Nearest: 992."),
        ({"height": 1008, "family": "Wan2.2 5B"}, "height is 1008; this model needs a multiple of 32 pixels."),
        ({"width": -16}, "width is -16"),
        ({"height": 99_968}, "height is 99968; the most is 16384. Nearest: 16384."),
        ({"frames": 82}, "frames is 82; Wan needs 4n+1 frames (1, 5, 9, ... 81). Nearest: 81."),
        ({"frames": 0}, "frames is 0"),
        ({"frames": 100_001}, "the most is 8193"),
        ({"family": "Flux"}, "'Flux' is not offered. Choose one of: Wan2.1, Wan2.2 14B; Wan2.2 5B."),
    ],
)
def test_bad_sizes_are_refused_in_one_sentence(nodes, name, inputs, words):
    assert words in refusal(nodes[name], **inputs)


def test_sizes_that_come_over_links_are_judged_when_they_are_there(nodes):
    node = nodes["T3EmptyLatent"]
    assert node.validate_inputs(family=None, frames=None, width=None, height=None) is True
    assert "frames is 82" in node.validate_inputs(family=None, frames=82, width=None, height=None)
    assert nodes["T3PlanPreview"].validate_inputs(FAMILIES[0], 82, 0, 0, latent=None) is True


def test_latents_that_do_not_fit_are_refused_in_words(nodes, monkeypatch):
    def no_room(*args, **kwargs):
        raise RuntimeError("allocator: you tried to allocate a great deal")

    monkeypatch.setattr(torch, "zeros", no_room)
    node = nodes["T3EmptyLatent"]
    with pytest.raises(ValueError, match=r"batch 7, take 1\.2 GB and do not fit. Choose a smaller size") as caught:
        node.execute(**{**defaults(node), "batch_size": 7})
    assert "\n" not in str(caught.value)


# T3 Load Latent


def save(samples, prefix="latents/ComfyUI"):
    """With the host's own node; gives the file."""
    import nodes as host_nodes

    return host_nodes.SaveLatent().save({"samples": samples}, prefix)["ui"]["latents"][0]


def age(path, seconds):
    """As if written that long ago."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def options(node):
    return next(i.options for i in node.GET_SCHEMA().inputs if i.id == "latent")


def test_without_any_file_it_says_what_to_do(nodes):
    assert options(nodes["T3LoadLatent"]) == ["newest"]
    sentence = nodes["T3LoadLatent"].validate_inputs(latent="newest")
    assert "no .latent file" in sentence and "SaveLatent" in sentence and "\n" not in sentence


@pytest.mark.parametrize(("channels", "size", "family"), [(16, "64 x 48", FAMILIES[0]), (48, "128 x 96", FAMILIES[1])])
def test_what_save_latent_wrote_is_loaded(nodes, folders, channels, size, family):
    samples = torch.randn(2, channels, 3, 6, 8)
    saved = save(samples)
    entry = f"output/latents/{saved['filename']}"
    assert options(nodes["T3LoadLatent"]) == ["newest", entry]
    for choice in ("newest", entry):
        latent, report = run(nodes["T3LoadLatent"], latent=choice)
        assert torch.equal(latent["samples"], samples)
        assert saved["filename"] in report and f"{size} pixels, 9 frames" in report and family in report


def test_the_list_is_recursive_and_newest_first(nodes, folders):
    save(torch.full((1, 16, 1, 4, 4), 1.0))
    save(torch.full((1, 16, 1, 4, 4), 2.0), "deep/down/below/x")
    top = folders["input"] / "mine.latent"
    top.write_bytes((folders["output"] / "latents/ComfyUI_00001_.latent").read_bytes())
    (folders["input"] / "other.txt").write_text("no latent")
    (folders["input"] / "folder.latent").mkdir()
    age(top, 50)
    age(folders["output"] / "latents/ComfyUI_00001_.latent", 10)
    expected = ["output/deep/down/below/x_00001_.latent", "output/latents/ComfyUI_00001_.latent", "input/mine.latent"]
    assert options(nodes["T3LoadLatent"]) == ["newest", *expected]
    assert run(nodes["T3LoadLatent"], latent="newest")[0]["samples"].mean() == 2
    assert run(nodes["T3LoadLatent"], latent="input/mine.latent")[0]["samples"].mean() == 1


def test_newest_runs_again_when_there_is_a_newer_file_or_the_file_changes(nodes, folders):
    node = nodes["T3LoadLatent"]
    save(torch.zeros(1, 16, 1, 4, 4))
    first = folders["output"] / "latents/ComfyUI_00001_.latent"
    age(first, 100)
    prints = [node.fingerprint_inputs(latent="newest")]
    assert node.fingerprint_inputs(latent="newest") == prints[0]
    age(first, -5)
    prints.append(node.fingerprint_inputs(latent="newest"))
    fixed = node.fingerprint_inputs(latent="output/latents/ComfyUI_00001_.latent")
    save(torch.zeros(1, 16, 1, 4, 4))
    prints.append(node.fingerprint_inputs(latent="newest"))
    assert len(set(prints)) == 3
    assert node.fingerprint_inputs(latent="output/latents/ComfyUI_00001_.latent") == fixed


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("output/latents/gone.latent", "does not exist (any more). Choose another of the list, or 'newest'."),
        ("output/../secret.latent", "is no .latent file under ComfyUI's output or input folder"),
        ("output/../../../etc/passwd", "is no .latent file under"),
        ("input//etc/passwd", "is no .latent file under"),
        ("/etc/passwd", "is no .latent file under"),
        ("latents/x.latent", "is no .latent file under"),
        ("output/x.safetensors", "is no .latent file under"),
        ("output", "is no .latent file under"),
        pytest.param(f"output/{'x' * 5000}.latent", "is no .latent file under", id="longer than names can be"),
        pytest.param("output/a\0b.latent", "is no .latent file under", id="no character of names"),
        ("", "is no .latent file under"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(nodes, folders, entry, words):
    (folders["output"].parent / "secret.latent").write_bytes(b"not to be read")
    (folders["output"] / "x.safetensors").write_bytes(b"")
    assert words in refusal(nodes["T3LoadLatent"], latent=entry)


def test_links_out_of_the_folders_are_not_followed(nodes, folders):
    secret = folders["output"].parent / "secret.latent"
    secret.write_bytes(b"not to be read")
    (folders["output"] / "link.latent").symlink_to(secret)
    assert "is no .latent file under" in nodes["T3LoadLatent"].validate_inputs(latent="output/link.latent")


def test_a_broken_file_is_refused_in_one_sentence(nodes, folders):
    (folders["output"] / "cut.latent").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="was cut short") as caught:
        run(nodes["T3LoadLatent"], latent="output/cut.latent")
    assert "\n" not in str(caught.value)
