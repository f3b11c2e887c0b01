"""T3 VAE Encode beside the host's own nodes: latents, what is left out, videos that begin with an image, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from host_clips import MARKS, Untouchable, free_memory_of
from host_nodes import refusal, run
from test_vae_host import host_vae
from vae_fixtures import off

ENCODE = "T3VAEEncode"
KINDS = ("Wan2.1", "Wan2.2")
pytest_plugins = ["host_node_fixtures", "host_clip_fixtures"]
pytestmark = MARKS


@pytest.fixture(scope="module")
def vaes(vae):
    """By generation. The host's loader knows Wan2.2 at the released width only, 2.8 GB: here a narrow one is put in."""
    from comfy.model_patcher import ModelPatcher

    other, cpu = copy.copy(vae), torch.device("cpu")
    other.first_stage_model = host_vae("Wan2.2", torch.float32)
    other.patcher = ModelPatcher(other.first_stage_model, load_device=cpu, offload_device=cpu)
    other.latent_channels = 48
    other.downscale_ratio = (vae.downscale_ratio[0], 16, 16)
    return {"Wan2.1": vae, "Wan2.2": other}


@pytest.fixture(params=KINDS)
def any_vae(vaes, request):
    return vaes[request.param]


def images(*shape, seed=0):
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed))


def host_latents(vae, pixels):
    import nodes as host_nodes

    return host_nodes.VAEEncode().encode(vae, pixels)[0]["samples"]


# Latents


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 48, 80), 0),
        ((9, 48, 64), 32),
        ((5, 37, 53), 16),
        ((1, 17, 31), 4096),
        ((7, 32, 32), 0),
        ((4, 32, 48), 16),
        ((2, 39, 16), 0),
        ((12, 40, 56), 24),
    ],
)
def test_latents_are_those_of_the_host(nodes, any_vae, shape, tile):
    """One picture, videos, counts that are not 4 n + 1, sizes that do not divide, one and many tiles."""
    pixels = images(*shape)
    expected, kept = host_latents(any_vae, pixels), pixels.clone()
    latent, report = run(nodes[ENCODE], pixels=pixels, vae=any_vae, tile_size=tile)
    found = latent["samples"]
    assert set(latent) == {"samples"}
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.device == expected.device
    assert expected.std() > 0.1  # not one number
    assert off(found, expected) < 1e-5
    assert torch.equal(pixels, kept)
    assert f"{'Wan2.1' if found.shape[1] == 16 else 'Wan2.2'} VAE" in report


@pytest.mark.parametrize("shape", [(1, 48, 64), (7, 37, 53)])
def test_in_float64_they_are_the_same_to_the_last_digits(nodes, any_vae, shape, monkeypatch):
    exact = copy.copy(any_vae)
    exact.first_stage_model = copy.deepcopy(any_vae.first_stage_model).double()
    exact.vae_dtype, exact.vae_output_dtype = torch.float64, lambda: torch.float64
    pixels = images(*shape).double()
    expected = host_latents(exact, pixels)
    found = run(nodes[ENCODE], pixels=pixels, vae=exact, tile_size=16)[0]["samples"]
    assert found.dtype == expected.dtype == torch.float64
    assert off(found, expected) < 1e-12


def test_several_clips_at_once(nodes, any_vae):
    """Images have no batch of clips in ComfyUI, but what gives five axes is understood."""
    clips = images(2, 6, 37, 32)
    latent, report = run(nodes[ENCODE], pixels=clips, vae=any_vae)
    assert "2 clips of 5 frames" in report
    for clip, found in zip(clips, latent["samples"], strict=True):
        assert off(found[None], host_latents(any_vae, clip)) < 1e-5


def test_images_in_half_precision_and_of_other_strides(nodes, any_vae):
    pixels = images(5, 32, 48).half()
    strided = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    found = run(nodes[ENCODE], pixels=strided, vae=any_vae)[0]["samples"]
    # The host doubles and shifts half-precision images in half precision; what it should give is this.
    assert off(found, host_latents(any_vae, pixels.float())) < 1e-5


def test_half_precision_vaes_encode_in_half_precision(nodes, any_vae, monkeypatch):
    pixels = images(5, 32, 48)
    expected = host_latents(any_vae, pixels)
    monkeypatch.setattr(any_vae, "vae_dtype", torch.bfloat16)
    latent, report = run(nodes[ENCODE], pixels=pixels, vae=any_vae)
    assert 1e-4 < off(latent["samples"], expected) < 0.1 and latent["samples"].dtype == torch.float32
    assert "torch.bfloat16" in report


def test_it_takes_the_place_of_the_host_s_nodes_in_a_graph(nodes):
    """The same inputs required, under the same names."""
    import nodes as host_nodes

    inputs = nodes[ENCODE].GET_SCHEMA().inputs
    assert [i.id for i in inputs if not i.optional] == list(host_nodes.VAEEncode.INPUT_TYPES()["required"])
    assert "tile_size" in {i.id for i in inputs} & set(host_nodes.VAEEncodeTiled.INPUT_TYPES()["required"])


# What is left out


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("Wan2.1", (1, 50, 67), ["from 67 x 50 to 64 x 48 pixels, since a Wan2.1 VAE encodes multiples of 8."]),
        ("Wan2.2", (1, 48, 67), ["from 67 x 48 to 64 x 48 pixels, since a Wan2.2 VAE encodes multiples of 16."]),
        ("Wan2.1", (7, 16, 16), ["the last 2 of 7 frames are left out, since Wan VAEs encode 1, 5, 9, ... frames."]),
        ("Wan2.2", (6, 16, 16), ["the last of 6 frames is left out"]),
        ("Wan2.1", (3, 17, 16), ["cropped about the middle", "the last 2 of 3 frames are left out"]),
        ("Wan2.1", (5, 16, 24), []),
    ],
)
def test_what_is_left_out_is_said_once(nodes, vaes, kind, shape, words, caplog):
    _, report = run(nodes[ENCODE], pixels=images(*shape), vae=vaes[kind])
    told = [record.message for record in caplog.records if record.name == "T3"]
    assert len(told) == len(words)
    for line, part in zip(told, words, strict=True):
        assert part in line and "\n" not in line
        assert report.count(line.removeprefix("T3 VAE ")) == 1
    assert len(report.splitlines()) == 2 + len(words)


def test_the_report_says_what_was_encoded_and_how(nodes, vae):
    _, report = run(nodes[ENCODE], pixels=images(5, 34, 48), vae=vae, tile_size=16)
    first, second, third = report.splitlines()
    assert first == "48 x 32 pixels, 5 frames, Wan2.1 VAE"
    assert second.startswith("6 tiles of at most 16 x 16 pixels") and second.endswith("torch.float32 on cpu")
    assert third.startswith("encode: the images are cropped")
    _, report = run(nodes[ENCODE], pixels=images(1, 16, 16), vae=vae)
    assert report.startswith("16 x 16 pixels, 1 frame, Wan2.1 VAE\n1 tile of at most 16 x 16 pixels")


# A video that begins with the images


def host_beginning(vae, pixels, width, height, length):
    from comfy_extras.nodes_wan import Wan22ImageToVideoLatent

    return Wan22ImageToVideoLatent.execute(vae, width, height, length, 1, pixels).result[0]


@pytest.mark.parametrize(("count", "length"), [(1, 17), (5, 21), (6, 9), (1, 5)])
def test_a_beginning_is_that_of_the_host_s_image_to_video_node(nodes, vaes, count, length):
    """Upscale Image and T3 VAE Encode make what Wan22ImageToVideoLatent makes of a picture of another shape."""
    import nodes as host_nodes

    pixels, vae = images(count, 50, 70), vaes["Wan2.2"]
    expected = host_beginning(vae, pixels, 96, 64, length)
    scaled = host_nodes.ImageScale().upscale(pixels, "bilinear", 96, 64, "center")[0]
    found, report = run(nodes[ENCODE], pixels=scaled, vae=vae, length=length)
    assert set(found) == set(expected) == {"samples", "noise_mask"}
    for name in found:
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype
    assert torch.equal(found["noise_mask"], expected["noise_mask"])
    assert off(found["samples"], expected["samples"]) < 1e-5
    begun = found["noise_mask"][0, 0, :, 0, 0] == 0
    assert begun.tolist() == [True] * (1 + (count - 1) // 4) + [False] * ((length - 1) // 4 - (count - 1) // 4)
    assert torch.equal(found["samples"][:, :, ~begun], expected["samples"][:, :, ~begun])
    assert f"the beginning of {length}, Wan2.2 VAE" in report


def test_a_length_that_the_images_fill_is_said(nodes, vaes, caplog):
    latent, report = run(nodes[ENCODE], pixels=images(9, 16, 16), vae=vaes["Wan2.2"], length=9)
    assert set(latent) == {"samples"} and latent["samples"].shape[2] == 3
    assert "length is 9, and the images alone make 9 frames, so no others follow." in report
    assert "the images alone" in caplog.text and "the beginning of" not in report


def test_models_that_do_not_start_from_latents_are_named(nodes, vaes, caplog):
    latent, report = run(nodes[ENCODE], pixels=images(1, 16, 16), vae=vaes["Wan2.1"], length=5)
    assert latent["samples"].shape == (1, 16, 2, 2, 2) and latent["noise_mask"].shape == (1, 1, 2, 2, 2)
    for text in (report, caplog.text):
        assert "models with the Wan2.1 VAE do not start from latents" in text and "WanImageToVideo" in text


# Progress and cancel


def test_progress_runs_to_its_end(nodes, any_vae, hook):
    run(nodes[ENCODE], pixels=images(9, 64, 64), vae=any_vae, tile_size=32)
    values = [value for value, _, _ in hook.calls]
    totals = {total for _, total, _ in hook.calls}
    assert values == sorted(values) and len(set(values)) > 20 and len(totals) == 1 and values[-1] == totals.pop()
    assert all(preview is None for _, _, preview in hook.calls)


@pytest.mark.parametrize("at", [1, 5, 12])
def test_cancel_stops_the_encode_at_the_next_frame(nodes, vae, hook, at):
    import comfy.model_management

    hook.after(at)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(nodes[ENCODE], pixels=images(5, 64, 48), vae=vae, tile_size=32)
    assert len(hook.calls) == at
    comfy.model_management.interrupt_current_processing(False)
    hook.after(None)
    assert run(nodes[ENCODE], pixels=images(5, 64, 48), vae=vae)[0]["samples"].shape == (1, 16, 2, 8, 6)


# Memory


def test_too_little_memory_is_said_before_the_work(nodes, vae, monkeypatch):
    free_memory_of(monkeypatch, 1000)
    with pytest.raises(ValueError, match="there is too little free memory on cpu for this encode: .* takes") as caught:
        run(nodes[ENCODE], pixels=images(5, 64, 48), vae=vae)
    assert "\n" not in str(caught.value)


def test_less_memory_makes_smaller_tiles_and_the_same_latents(nodes, vae, monkeypatch):
    pixels = images(1, 256, 320)
    whole, report = run(nodes[ENCODE], pixels=pixels, vae=vae)
    assert "1 tile of at most 320 x 256 pixels" in report
    monkeypatch.setattr("comfyui_t3_pack.nodes.host_vae.free_bytes", lambda device: 30_000_000)
    tiled, report = run(nodes[ENCODE], pixels=pixels, vae=vae)
    assert int(report.splitlines()[1].split()[0]) > 1
    assert off(tiled["samples"], whole["samples"]) < 1e-5


@pytest.mark.parametrize("at", [2, 6])
def test_memory_that_runs_out_in_the_middle_is_told_and_nothing_is_lost(pack, nodes, vae, monkeypatch, caplog, at):
    pixels = images(5, 64, 48)
    expected = host_latents(vae, pixels)
    encoder = pack.nodes.host_encode.WanEncoder
    features, calls = encoder.features, []

    def runs_out(*args):
        calls.append(args)
        if len(calls) == at:
            raise torch.OutOfMemoryError("out of memory")
        return features(*args)

    monkeypatch.setattr(encoder, "features", runs_out)
    latent, report = run(nodes[ENCODE], pixels=pixels, vae=vae, tile_size=32)
    assert off(latent["samples"], expected) < 1e-5
    for text in (report, caplog.text):
        assert "memory ran out with tiles of 24 x 32 pixels; going on with 24 x 16" in text


# What is refused


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.rand(1, 32, 32, 4), "have 4 channels; a Wan VAE encodes 3, red, green, blue. Take the transparency off"),
        (torch.rand(1, 32, 32, 1), "have 1 channels; a Wan VAE encodes 3"),
        (torch.rand(32, 32, 3), "have the shape 32 x 32 x 3; images are frames x height x width x 3"),
        (torch.rand(0, 32, 32, 3), "have the shape 0 x 32 x 32 x 3"),
        (torch.rand(1, 7, 32, 3), "are 32 x 7 pixels; the least that a Wan2.1 VAE encodes is 8 x 8"),
        (torch.full((5, 16, 16, 3), math.nan), "NaN or infinity in frame 0"),
        (torch.full((1, 16, 16, 3), math.inf), "NaN or infinity"),
        (torch.rand(1, 16, 16, 3) * 255, "If they are 0 to 255"),
    ],
)
def test_images_of_no_use_are_refused_in_one_sentence(nodes, vae, pixels, words):
    with pytest.raises(ValueError) as caught:
        run(nodes[ENCODE], pixels=pixels, vae=vae)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def other_vae(state):
    model = torch.nn.Linear(2, 2) if state is None else type("Model", (), {"state_dict": lambda self: state})()
    return type("Other", (), {"first_stage_model": model})


def test_other_vaes_are_refused_in_one_sentence(nodes, vae):
    state = vae.first_stage_model.state_dict()
    four = {**state, "encoder.conv1.weight": torch.zeros(8, 4, 3, 3, 3)}
    decoder_only = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    for other, words in (
        (object(), "this VAE is empty"),
        (other_vae(None), "the VAE (Linear) is not one of Wan's: connect the Wan2.1 or Wan2.2 VAE, or encode with"),
        (other_vae({}), "the VAE (Model) is not one of Wan's"),
        (other_vae(decoder_only), "hold no Wan VAE encoder"),
        (other_vae(four), "encoder takes 4 channels; only RGB is encoded"),
    ):
        with pytest.raises(ValueError) as caught:
            run(nodes[ENCODE], pixels=images(1, 16, 16), vae=other)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"tile_size": 8}, "tile_size is 8; it is 0 or 16 to 16384. Nearest: 16."),
        ({"tile_size": 99999}, "Nearest: 16384."),
        ({"length": 80}, "length is 80; a video has 1, 5, 9, ... 8193 frames. Nearest: 81."),
        ({"length": 0}, "length is 0; a video has 1, 5, 9, ... 8193 frames. Nearest: 1."),
        ({"length": -6}, "Nearest: 1."),
        ({"length": 10001}, "Nearest: 8193."),
    ],
)
def test_bad_widgets_are_refused_in_one_sentence(nodes, vae, inputs, words, monkeypatch):
    monkeypatch.setattr(vae, "first_stage_model", Untouchable(vae.first_stage_model))
    assert words in refusal(nodes[ENCODE], pixels=images(1, 16, 16), vae=vae, **inputs)


def test_widgets_that_come_over_links_are_judged_when_they_are_there(nodes):
    assert nodes[ENCODE].validate_inputs(None, None) is True
