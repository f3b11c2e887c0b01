"""T3 VAE Decode and T3 VAE Decode to Video beside the host's own nodes: pixels, progress, cancel, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from host_clips import BUFFER, CLOSE, DECODE, FPS, MARKS, TO_VIDEO, Untouchable, frames_of, host_images, latents
from host_nodes import defaults, refusal, run

pytest.importorskip("av")
pytest_plugins = ["host_node_fixtures", "host_clip_fixtures"]
pytestmark = MARKS


# Decode to images


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 16, 3, 6, 8), 0),
        ((1, 16, 2, 7, 9), 40),
        ((2, 16, 2, 3, 5), 24),
        ((1, 16, 1, 3, 9), 16),
        ((3, 16, 1, 4, 4), 0),
        ((1, 16, 4, 1, 1), 4096),
    ],
)
def test_images_are_those_of_the_host(nodes, vae, shape, tile):
    """Batches, one frame, odd sizes, one and many tiles."""
    samples = latents(*shape)
    expected = host_images(vae, samples)
    kept = samples["samples"].clone()
    images, report = run(nodes[DECODE], samples=samples, vae=vae, tile_size=tile)
    assert images.shape == expected.shape and images.dtype == expected.dtype and images.device == expected.device
    assert expected.std() > 0.05  # a picture, not one colour
    assert (images - expected).abs().max() < CLOSE
    assert torch.equal(samples["samples"], kept)
    assert f"{shape[4] * 8} x {shape[3] * 8} pixels" in report and "Wan2.1 VAE" in report


def test_the_report_says_how_it_was_decoded(nodes, vae):
    _, report = run(nodes[DECODE], samples=latents(2, 16, 2, 4, 6), vae=vae, tile_size=16, crop=24)
    assert "48 x 24 pixels (cropped from 32 rows), 2 clips of 5 frames, one after the other" in report
    assert "6 tiles of at most 16 x 16 pixels" in report and "torch.float32 on cpu" in report


def test_crop_is_about_the_middle(nodes, vae, clip):
    images, _ = run(nodes[DECODE], samples=clip[0], vae=vae, crop=36)
    assert images.shape == (9, 36, 64, 3)
    assert (images - clip[1][:, 6:42]).abs().max() < CLOSE


def test_half_precision_vaes_decode_in_half_precision(nodes, vae, clip, monkeypatch):
    monkeypatch.setattr(vae, "vae_dtype", torch.bfloat16)
    images, report = run(nodes[DECODE], samples=clip[0], vae=vae)
    error = (images - clip[1]).abs()
    assert 1e-4 < error.mean() < 0.03 and images.dtype == torch.float32
    assert "torch.bfloat16" in report


def test_latents_in_half_precision_and_of_other_strides(nodes, vae, clip):
    samples = clip[0]["samples"].half()
    strided = samples.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    images, _ = run(nodes[DECODE], samples={"samples": strided}, vae=vae)
    assert (images - host_images(vae, {"samples": samples})).abs().max() < CLOSE


def test_video_and_sound_latents_in_one(nodes, vae, clip):
    from comfy.nested_tensor import NestedTensor

    both = NestedTensor([clip[0]["samples"], torch.zeros(1, 8, 20)])
    assert (run(nodes[DECODE], samples={"samples": both}, vae=vae)[0] - clip[1]).abs().max() < CLOSE


def test_it_takes_the_place_of_the_host_s_nodes_in_a_graph(nodes):
    """The same inputs required, under the same names."""
    import nodes as host_nodes

    inputs = nodes[DECODE].GET_SCHEMA().inputs
    assert [i.id for i in inputs if not i.optional] == list(host_nodes.VAEDecode.INPUT_TYPES()["required"])
    assert "tile_size" in {i.id for i in inputs} & set(host_nodes.VAEDecodeTiled.INPUT_TYPES()["required"])
    assert [i.id for i in nodes[TO_VIDEO].GET_SCHEMA().inputs if not i.optional] == ["samples", "vae", "fps"]


# Decode to video


@pytest.mark.parametrize(("depth", "dtype", "levels"), [(8, torch.uint8, 255), (10, torch.uint16, 65535)])
def test_the_buffer_holds_the_frames_rounded_to_nearest(nodes, vae, clip, depth, dtype, levels):
    video, report = run(nodes[TO_VIDEO], samples=clip[0], vae=vae, fps=FPS, bit_depth=depth, audio=None)
    frames = frames_of(video)
    assert frames.dtype == dtype and frames.shape == (9, 48, 64, 3)
    assert (frames.to(torch.float32) / levels - clip[1]).abs().max() <= 0.5 / levels + CLOSE
    assert f"1.12 s at 8 frames per second, {depth} bits" in report
    assert video.get_bit_depth() == depth


# Sound


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        ({"waveform": torch.zeros(1, 3, 100), "sample_rate": 48000}, "has 3 channels. A video takes 1, 2 or 6"),
        ({"waveform": torch.zeros(1, 2, 0), "sample_rate": 48000}, "has the shape [2, 0]"),
        ({"waveform": torch.full((1, 2, 5), math.nan), "sample_rate": 48000}, "10 samples of the audio are NaN"),
        ({"waveform": torch.zeros(1, 2, 100), "sample_rate": 0}, "0 samples per second"),
    ],
)
def test_sound_that_no_file_holds_is_refused_before_the_work(nodes, vae, clip, audio, words, monkeypatch):
    monkeypatch.setattr(vae, "first_stage_model", Untouchable(vae.first_stage_model))
    with pytest.raises(ValueError) as caught:
        run(nodes[TO_VIDEO], samples=clip[0], vae=vae, audio=audio)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Memory


# Progress and cancel


def test_progress_runs_to_its_end_and_shows_a_small_picture(nodes, vae, clip, hook, monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr("comfyui_t3_pack.nodes.host_vae._PREVIEW_SECONDS", 0)
    monkeypatch.setattr("comfyui_t3_pack.nodes.host_vae._PREVIEW_PIXELS", 32)
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    images, _ = run(nodes[DECODE], samples=clip[0], vae=vae, tile_size=32)
    values = [value for value, _, _ in hook.calls]
    totals = {total for _, total, _ in hook.calls}
    assert values == sorted(values) and len(set(values)) > 20 and len(totals) == 1 and values[-1] == totals.pop()
    kind, picture, _ = hook.calls[-1][2]
    assert kind == "JPEG" and picture.size == (32, 24)
    assert np.array_equal(np.asarray(picture), images[0, ::2, ::2].mul(255).to(torch.uint8).numpy())
    assert (images - clip[1]).abs().max() < CLOSE, "the picture is a copy"


def test_the_small_picture_grows_tile_by_tile(nodes, vae, clip, hook, monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr("comfyui_t3_pack.nodes.host_vae._PREVIEW_SECONDS", 0)
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    run(nodes[TO_VIDEO], samples=clip[0], vae=vae, tile_size=32)
    seen = [np.asarray(preview[1]).any(axis=-1) for _, _, preview in hook.calls]
    shares = [picture.mean() for picture in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.9
    first = next(picture for picture in seen if picture.any())
    # 48 rows of 64 pixels in tiles of at most 32: two rows of two.
    assert first[:24, :32].mean() > 0.9 and not first[24:].any() and not first[:, 32:].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_pictures_of_any_buffer(pack, dtype):
    levels = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    frame = torch.tensor([0.0, 0.5, 1.0]).mul(levels).to(dtype).expand(4, 4, 3)
    assert np.asarray(pack.nodes.host_vae.small_picture(frame))[0, 0].tolist() == [0, 127, 255]


def test_no_picture_where_previews_are_off(nodes, vae, clip, hook, monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr("comfyui_t3_pack.nodes.host_vae._PREVIEW_SECONDS", 0)
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    run(nodes[DECODE], samples=clip[0], vae=vae)
    assert hook.calls and all(preview is None for _, _, preview in hook.calls)


@pytest.mark.parametrize("name", [DECODE, TO_VIDEO])
@pytest.mark.parametrize("at", [1, 5, 12])
def test_cancel_stops_the_decode_at_the_next_frame(nodes, vae, clip, folders, hook, name, at, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 10**9)
    hook.after(at)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(nodes[name], samples=clip[0], vae=vae, tile_size=32)
    assert len(hook.calls) == at
    assert not any(folders["temp"].iterdir()) and not any(folders["output"].iterdir())
    comfy.model_management.interrupt_current_processing(False)
    hook.after(None)
    assert run(nodes[name], samples=clip[0], vae=vae)[0] is not None


# What is refused


@pytest.mark.parametrize("name", [DECODE, TO_VIDEO])
@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (latents(1, 16, 6, 8), "have the shape 1 x 16 x 6 x 8; video latents are batch x channels x frames"),
        (latents(1, 16, 0, 6, 8), "have the shape 1 x 16 x 0 x 6 x 8"),
        (latents(1, 48, 1, 6, 8), "have 48 channels, and this Wan2.1 VAE decodes 16. These are latents of Wan2.2 5B."),
        (latents(1, 4, 1, 6, 8), "have 4 channels, and this Wan2.1 VAE decodes 16. Load the VAE"),
        ({"samples": torch.full((1, 16, 1, 6, 8), math.nan)}, "NaN"),
        ({"samples": torch.full((1, 16, 1, 6, 8), -math.inf)}, "NaN or infinity"),
    ],
)
def test_latents_of_no_use_are_refused_in_one_sentence(nodes, vae, name, samples, words):
    with pytest.raises(ValueError) as caught:
        run(nodes[name], samples=samples, vae=vae)
    assert words in str(caught.value) and "\n" not in str(caught.value)


class Empty:
    first_stage_model = None


def other_vae(state):
    class Other:
        first_stage_model = torch.nn.Linear(2, 2) if state is None else None

    if state is not None:
        Other.first_stage_model = type("Model", (), {"state_dict": lambda self: state})()
    return Other


@pytest.mark.parametrize("name", [DECODE, TO_VIDEO])
def test_other_vaes_are_refused_in_one_sentence(nodes, vae, clip, name):
    upscaling = dict(vae.first_stage_model.state_dict())
    upscaling["decoder.head.2.weight"] = torch.zeros(12, 8, 3, 3, 3)
    for other, words in (
        (Empty(), "this VAE is empty"),
        (other_vae(None), "the VAE (Linear) is not one of Wan's: connect the Wan2.1 or Wan2.2 VAE"),
        (other_vae({}), "the VAE (Model) is not one of Wan's"),
        (other_vae(upscaling), "gives 12 channels, not 3"),
        (object(), "this VAE is empty"),
    ):
        with pytest.raises(ValueError) as caught:
            run(nodes[name], samples=clip[0], vae=other)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [DECODE, TO_VIDEO])
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"crop": 35}, "crop is 35; it is 0 or an even number of rows up to 16384. Nearest: 34."),
        ({"crop": -2}, "crop is -2"),
        ({"tile_size": 8}, "tile_size is 8; it is 0 or 16 to 16384. Nearest: 16."),
        ({"tile_size": -1}, "tile_size is -1"),
        ({"tile_size": 99999}, "Nearest: 16384."),
    ],
)
def test_bad_widgets_are_refused_in_one_sentence(nodes, vae, clip, name, inputs, words):
    assert words in refusal(nodes[name], samples=clip[0], vae=vae, **inputs)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"fps": 0.0}, "outside 0.01 to 1000 frames per second"),
        ({"fps": 5000.0}, "outside 0.01 to 1000"),
        ({"bit_depth": 9}, "bit_depth is 9; a video is written with 8 or 10."),
        ({"bit_depth": 12}, "bit_depth is 12"),
    ],
)
def test_bad_video_widgets_are_refused_in_one_sentence(nodes, vae, clip, inputs, words):
    assert words in refusal(nodes[TO_VIDEO], samples=clip[0], vae=vae, **inputs)


def test_widgets_that_come_over_links_are_judged_when_they_are_there(nodes):
    assert nodes[DECODE].validate_inputs(None, None) is True
    assert "bit_depth is 9" in nodes[TO_VIDEO].validate_inputs(None, 9, None, None)
    assert nodes[TO_VIDEO].validate_inputs(**{n: defaults(nodes[TO_VIDEO]).get(n) for n in ("fps", "crop")}) is True


@pytest.mark.parametrize("name", [DECODE, TO_VIDEO])
def test_more_rows_than_there_are_and_pictures_too_small_for_video(nodes, vae, clip, name, monkeypatch):
    monkeypatch.setattr(vae, "first_stage_model", Untouchable(vae.first_stage_model))
    with pytest.raises(ValueError, match="Frames of 48 rows cannot be cropped to 50. Use 1 to 48 rows."):
        run(nodes[name], samples=clip[0], vae=vae, crop=50)


def test_a_picture_too_small_for_h264_is_refused_before_the_work(nodes, vae, monkeypatch):
    monkeypatch.setattr(vae, "first_stage_model", Untouchable(vae.first_stage_model))
    with pytest.raises(ValueError, match="no video can be made of this: 8 x 8 cannot be written"):
        run(nodes[TO_VIDEO], samples=latents(1, 16, 1, 1, 1), vae=vae)
