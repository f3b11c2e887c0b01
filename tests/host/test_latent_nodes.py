"""T3 Empty Latent and T3 Load Latent as a user meets them, beside the host's own nodes."""

from __future__ import annotations

import os
import re

import pytest
import torch
from host_nodes import defaults, refusal, run

pytest_plugins = ["host_node_fixtures"]
pytestmark = pytest.mark.usefixtures("folders")


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


def test_over_a_link_any_file_may_be_meant(nodes, folders):
    """The name is not there yet when the host asks: a newer file, or another in one's place, is read again."""
    node = nodes["T3LoadLatent"]
    prints = [node.fingerprint_inputs(latent=None)]
    save(torch.zeros(1, 16, 1, 4, 4))
    prints.append(node.fingerprint_inputs(latent=None))
    assert node.fingerprint_inputs(latent=None) == prints[-1]
    age(folders["output"] / "latents/ComfyUI_00001_.latent", 100)
    prints.append(node.fingerprint_inputs(latent=None))
    assert len(set(prints)) == 3


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
    # Nor are they offered, or taken for the newest.
    age(secret, -100)
    save(torch.ones(1, 16, 1, 4, 4))
    (folders["output"] / "inside.latent").symlink_to(folders["output"] / "latents/ComfyUI_00001_.latent")
    assert set(options(nodes["T3LoadLatent"])) == {
        "newest",
        "output/latents/ComfyUI_00001_.latent",
        "output/inside.latent",
    }
    assert run(nodes["T3LoadLatent"], latent="newest")[0]["samples"].mean() == 1


def test_a_broken_file_is_refused_in_one_sentence(nodes, folders):
    (folders["output"] / "cut.latent").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="was cut short") as caught:
        run(nodes["T3LoadLatent"], latent="output/cut.latent")
    assert "\n" not in str(caught.value)
