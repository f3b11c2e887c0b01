"""The shipped workflows as files: up to date with their source, complete, and with the release's settings."""

from __future__ import annotations

import json
import re

import pytest

from t3.generate import DEFAULTS, EMBEDDED_DEFAULTS, EMBEDDED_PROMPT, NEGATIVE_PROMPT
from tools import notes
from tools.graph import NOTE, boxes, overlaps
from tools.workflows import FOLDER, as_text, graphs

pytest_plugins = ["host_fixtures"]

NAMES = [graph.name for graph in graphs()]
UI = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
API = {name: json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}


SMALL = "Small model T3 on any machine"
DECODE = "T3VAEDecodeToVideo"


def of_kind(name: str, kind: str) -> list[dict]:
    """The inputs of every node of this kind in a workflow's API twin."""
    return [node["inputs"] for node in API[name].values() if node["class_type"] == kind]


def upstream(name: str, link: list) -> list[str]:
    """What a model goes through before it arrives at `link`, last node first."""
    node = API[name][link[0]]
    before = node["inputs"].get("model")
    return [node["class_type"], *(upstream(name, before) if before else [])]


def texts(name: str) -> str:
    return "\n".join(node["widgets_values"][0] for node in UI[name]["nodes"] if node["type"] == NOTE)


def test_files_are_what_their_source_gives(host):
    """`python -m tools.workflows URL` has been run since the source or a node's schema changed."""
    info = host.object_info()
    for graph in graphs():
        for path, expected in (
            (FOLDER / f"{graph.name}.json", graph.ui(info)),
            (FOLDER / "api" / f"{graph.name}.json", graph.api(info)),
        ):
            assert path.read_text(encoding="utf-8") == as_text(expected), f"run python -m tools.workflows: {path.name}"


def test_no_other_files():
    """ComfyUI lists every JSON file at the root of the folder, and looks for a picture of the same name."""
    expected = {f"{name}{suffix}" for name in NAMES for suffix in (".json", ".jpg")}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == expected
    assert {path.name for path in (FOLDER / "api").iterdir()} == {f"{name}.json" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_safe_in_file_systems_and_addresses(name):
    assert re.fullmatch(r"[\w. -]+", name, re.ASCII) and name == name.strip()


@pytest.mark.parametrize("name", NAMES)
def test_pictures(name):
    from PIL import Image

    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path) as image:
        assert image.format == "JPEG" and image.width >= 400


@pytest.mark.parametrize("name", NAMES)
def test_tidy(name):
    """No node covers another; all lie in a column's group, but for notes; every note has a text."""
    ui = UI[name]
    assert overlaps(boxes(ui)) == []
    for node in ui["nodes"]:
        if node["type"] == NOTE:
            assert len(node["widgets_values"][0]) > 50
            continue
        x, y = node["pos"]
        assert any(
            left <= x and x + node["size"][0] <= left + width and top <= y and y + node["size"][1] <= top + height
            for left, top, width, height in (group["bounding"] for group in ui["groups"])
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_model_file_is_named_in_a_note_with_link_and_folder(name):
    loaded = {
        value
        for node in API[name].values()
        for value in node["inputs"].values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }
    assert loaded
    # T3's loader has files of two folders in its list.
    loaded = {entry.rpartition("/")[2] for entry in loaded}
    known = {file.name: file for file in (*notes.FILES, *notes.OWN_FILES)}
    own = {file.name for file in notes.OWN_FILES}
    offered = {file["name"] for node in UI[name]["nodes"] for file in node["properties"].get("models", ())}
    assert offered == loaded - own
    for file in loaded:
        assert (file if file in own else known[file].url) in texts(name)
        assert f"models/{known[file].folder}" in texts(name)


@pytest.mark.parametrize("name", [name for name in NAMES if of_kind(name, "KSampler") and name != SMALL])
def test_settings_are_the_releases(name):
    (sampler,) = of_kind(name, "KSampler")
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["denoise"], sampler["cfg"]) == (
        "euler",
        "simple",
        1,
        5,
    )
    assert [inputs["shift"] for inputs in of_kind(name, "ModelSamplingSD3")] == [5]
    assert 1000 % sampler["steps"] == 0
    if "quick" not in name:
        assert sampler["steps"] == DEFAULTS["steps"]
    negative = API[name][sampler["negative"][0]]["inputs"]["text"]
    assert negative == NEGATIVE_PROMPT
    for inputs in of_kind(name, "T3VAEDecodeToVideo"):
        assert inputs["fps"] == DEFAULTS["fps"]
    assert [kind for kind in upstream(name, sampler["model"]) if kind in ("T3Attention", "T3RetrofitLoader")]
    assert "noise" in texts(name), "the notes must say what stock weights give"


def test_the_embedded_model_runs_with_its_own_settings():
    """Those of the command line; its plan comes from its own file; prompt and padding are as long as in training."""
    (sampler,), (size,), (decoded,) = (of_kind(SMALL, kind) for kind in ("KSampler", "T3EmptyLatent", DECODE))
    found = {name: size[name] for name in ("height", "width", "frames")}
    found |= {"steps": sampler["steps"], "cfg": sampler["cfg"], "fps": decoded["fps"], "negative_prompt": ""}
    assert found == EMBEDDED_DEFAULTS
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["denoise"]) == ("euler", "simple", 1)
    assert [inputs["shift"] for inputs in of_kind(SMALL, "ModelSamplingSD3")] == [5]
    (unet,), (t3,) = of_kind(SMALL, "UNETLoader"), of_kind(SMALL, "T3RetrofitLoader")
    assert t3["file"] == f"diffusion_models/{unet['unet_name']}"
    assert "T3RetrofitLoader" in upstream(SMALL, sampler["model"])
    prompts = {name: texts_before(sampler[name]) for name in ("positive", "negative")}
    assert {name: prompt for name, (prompt, _) in prompts.items()} == {
        "positive": EMBEDDED_PROMPT,
        "negative": EMBEDDED_DEFAULTS["negative_prompt"],
    }
    for prompt, padding in prompts.values():
        # Each of the two ends in a token of its own.
        assert len(prompt.split()) + 1 + len(padding.split()) + 1 == 512


def texts_before(link) -> tuple[str, str]:
    """Of a padded prompt in the small model's workflow: its text, and that of what is set to zero behind it."""
    joined = API[SMALL][link[0]]
    assert joined["class_type"] == "ConditioningConcat"
    zeros = API[SMALL][joined["inputs"]["conditioning_from"][0]]
    assert zeros["class_type"] == "ConditioningZeroOut"
    sources = joined["inputs"]["conditioning_to"][0], zeros["inputs"]["conditioning"][0]
    prompt, padding = (API[SMALL][source]["inputs"]["text"] for source in sources)
    return prompt, padding


@pytest.mark.parametrize("name", [name for name in NAMES if "image-to-video" in name])
def test_image_to_video_says_that_it_is_unproven(name):
    assert next(node["title"] for node in UI[name]["nodes"] if node["type"] == NOTE).startswith("UNPROVEN")
    (size,), (encode,) = of_kind(name, "ImageScale"), of_kind(name, "T3VAEEncode")
    assert (size["height"], size["width"], encode["length"]) == (
        DEFAULTS["height"],
        DEFAULTS["width"],
        DEFAULTS["frames"],
    )
    # As Wan22ImageToVideoLatent does it.
    assert (size["upscale_method"], size["crop"]) == ("bilinear", "center")


@pytest.mark.parametrize("name", NAMES)
def test_reports_are_shown(name):
    """Every report a T3 node gives in a workflow that samples or loads can be read in it."""
    shown = {API[name][inputs["source"][0]]["class_type"] for inputs in of_kind(name, "PreviewAny")}
    there = {node["class_type"] for node in API[name].values()}
    assert shown == there & {"T3Attention", "T3RetrofitLoader", "T3LoadLatent", "T3VAEDecodeToVideo", "T3VAEEncode"}
