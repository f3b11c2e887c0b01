"""The VIDEO that T3 VAE Decode to Video gives: what it says of itself, how it is saved and trimmed."""

from __future__ import annotations

import io
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from host_clips import CLOSE, FPS, MARKS, TO_VIDEO, frames_of, pictures, tone
from host_nodes import run

av = pytest.importorskip("av")
pytest_plugins = ["host_node_fixtures", "host_clip_fixtures"]
pytestmark = MARKS
WORKFLOW = {"nodes": [{"id": 1, "type": "T3VAEDecodeToVideo"}], "extra": "ein Fuchs, 影"}


def test_what_a_video_says_of_itself_builds_no_float_frames(video, monkeypatch):
    monkeypatch.setattr(type(video), "get_components", None)
    assert video.get_dimensions() == (64, 48)
    assert video.get_frame_count() == 9
    assert video.get_frame_rate() == Fraction(FPS) and isinstance(video.get_frame_rate(), Fraction)
    assert video.get_duration() == pytest.approx(9 / FPS)
    assert video.get_bit_depth() == 8
    assert video.get_active_trim_window() == (0.0, 0.0)
    trimmed = video.as_trimmed(0.25, 0.5)
    assert trimmed.get_frame_count() == 4 and trimmed.get_dimensions() == (64, 48)


def test_nothing_of_a_video_is_left_to_the_host_s_defaults(video):
    from comfy_api.latest import Input

    for name in (n for n in vars(Input.Video) if not n.startswith("_")):
        assert getattr(type(video), name) is not getattr(Input.Video, name), name


def test_get_video_components_gives_the_frames_back(nodes, vae, clip):
    from comfy_extras.nodes_video import GetVideoComponents

    audio = tone(0.5)
    video, _ = run(nodes[TO_VIDEO], samples=clip[0], vae=vae, fps=FPS, bit_depth=10, audio=audio)
    images, sound, fps, depth = GetVideoComponents.execute(video).result
    assert images.dtype == torch.float32 and (images - clip[1]).abs().max() <= 0.5 / 65535 + CLOSE
    assert sound is audio and fps == FPS and depth == 10


def save(video, **options):
    """With the host's Save Video, as its graph engine calls it; gives the file."""
    from comfy_api.latest import _io
    from comfy_extras.nodes_video import SaveVideo

    node = SaveVideo.PREPARE_CLASS_CLONE(None)
    node.hidden = _io.HiddenHolder.from_dict(
        {_io.Hidden.prompt: {"1": {"class_type": TO_VIDEO}}, _io.Hidden.extra_pnginfo: {"workflow": WORKFLOW}}
    )
    settings = {"format": "auto", "codec": {"codec": "auto"}, **options}
    result = node.execute(video, filename_prefix="video/clip", **settings)
    import folder_paths

    saved = result.ui.values[0] if hasattr(result.ui, "values") else result.ui.as_dict()["images"][0]
    return Path(folder_paths.get_output_directory()) / saved["subfolder"] / saved["filename"]


def metadata(path):
    with av.open(str(path)) as container:
        return dict(container.metadata)


@pytest.mark.parametrize("depth", [8, 10])
def test_save_video_writes_frames_rate_sound_and_graph(nodes, vae, clip, depth):
    inputs = {"samples": clip[0], "vae": vae, "fps": FPS, "bit_depth": depth, "crop": 32, "audio": tone(3)}
    video, _ = run(nodes[TO_VIDEO], **inputs)
    path = save(video)
    found, stream = pictures(path)
    assert path.suffix == ".mp4" and found.shape == (9, 32, 64, 3)
    assert stream.average_rate == FPS and stream.codec_context.name == "h264"
    assert ("10" in stream.codec_context.pix_fmt) == (depth == 10)
    # H.264 halves the colours' resolution; grey keeps its own.
    grey = np.array([0.2126, 0.7152, 0.0722], np.float32)
    assert np.abs((found - clip[1][:, 8:40].numpy()) @ grey).mean() < 0.03
    written = metadata(path)
    assert json.loads(written["workflow"]) == WORKFLOW
    assert json.loads(written["prompt"]) == {"1": {"class_type": TO_VIDEO}}
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        assert container.streams.audio[0].rate == 48000 and container.streams.audio[0].channels == 2
        assert abs(samples / 48000 - 9 / FPS) < 2 * 1024 / 48000  # cut where the frames end


def test_crf_of_save_video_is_obeyed(video):
    sizes = []
    for crf in (1.0, 40.0):
        codec = {"codec": "h264", "encoding": {"encoding": "re-encode", "crf": crf}}
        sizes.append(save(video, format="mp4", codec=codec).stat().st_size)
    assert sizes[0] > 3 * sizes[1]


def test_bit_depth_can_be_chosen_when_saving(video, folders):
    path = folders["output"] / "ten.mp4"
    video.save_to(str(path), bit_depth=10)
    assert pictures(path)[1].codec_context.pix_fmt == "yuv420p10le"


@pytest.mark.parametrize("options", [{"format": "webm"}, {"codec": "av1"}, {"bit_depth": 12}, {"crf": 52}])
def test_what_cannot_be_written_is_refused_and_the_old_file_stays(video, folders, options):
    path = folders["output"] / "old.mp4"
    path.write_bytes(b"older work")
    with pytest.raises(ValueError) as caught:
        video.save_to(str(path), **options)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"older work" and os.listdir(folders["output"]) == ["old.mp4"]


def test_an_existing_file_is_replaced_as_the_host_does(video, folders):
    path = folders["output"] / "old.mp4"
    path.write_bytes(b"older work")
    video.save_to(str(path))
    assert len(pictures(path)[0]) == 9 and os.listdir(folders["output"]) == ["old.mp4"]


def test_stream_source_and_byte_streams_are_whole_mp4s(video, folders):
    first = video.get_stream_source()
    with av.open(first) as container:
        assert container.format.name == video.get_container_format()
    assert len(pictures(video.get_stream_source())[0]) == 9
    buffer = io.BytesIO()
    video.save_to(buffer, format="mp4", codec="h264", metadata={"workflow": WORKFLOW})
    buffer.seek(0)
    with av.open(buffer) as container:
        assert json.loads(container.metadata["workflow"]) == WORKFLOW
    assert os.listdir(folders["temp"]) == []


def test_the_stream_is_encoded_once(video, monkeypatch):
    first = video.get_stream_source()
    first.read()
    monkeypatch.setattr(type(video), "save_to", None)
    again = video.get_stream_source()
    assert again.tell() == 0 and again.getvalue() == first.getvalue()


def test_cancel_while_saving_leaves_no_file(video, folders, hook):
    import comfy.model_management

    hook.after(4)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(video)
    assert [path for path in folders["output"].rglob("*") if path.is_file()] == []
    assert len(hook.calls) == 4


def test_a_disk_that_fills_while_saving_leaves_no_file(video, folders, monkeypatch):
    from comfyui_t3_pack.t3.video import VideoWriter

    def full(self, frame):
        if self.frames_written == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoWriter, "_write", full)
    with pytest.raises(ValueError, match="failed after 3 frames: No space left on device"):
        save(video)
    assert [path for path in folders["output"].rglob("*") if path.is_file()] == []


# Trimmed videos

WINDOWS = [(0, 0), (0, 0.5), (0.25, 0.5), (0.3, 0.4), (-0.5, 0), (-0.5, 0.25), (1.0, 5), (0.1, 0), (-9, 0.5)]


@pytest.fixture(scope="module")
def ladder(pack):
    """A video whose frames tell their number, with its file as the host trims it."""
    frames = torch.arange(9, dtype=torch.uint8).mul(25).add(20)[:, None, None, None].expand(9, 48, 64, 3).contiguous()
    video = pack.nodes.frames_video.FramesVideo(frames, Fraction(FPS), tone(9 / FPS))
    return video


def numbers(images):
    return [round((float(image.mean()) * 255 - 20) / 25) for image in images]


@pytest.mark.parametrize(("start", "duration"), WINDOWS)
def test_a_trimmed_video_holds_the_frames_that_the_host_takes_of_a_file(ladder, start, duration):
    from comfy_api.latest import InputImpl

    expected = InputImpl.VideoFromFile(ladder.get_stream_source()).as_trimmed(start, duration, strict_duration=False)
    trimmed = ladder.as_trimmed(start, duration, strict_duration=False)
    expected = numbers(expected.get_components().images)
    assert numbers(trimmed.get_components().images) == expected
    assert trimmed.get_frame_count() == len(expected)
    assert trimmed.get_duration() == pytest.approx(len(expected) / FPS)
    assert numbers(pictures(trimmed.get_stream_source())[0]) == expected
    assert frames_of(trimmed).untyped_storage().data_ptr() == frames_of(ladder).untyped_storage().data_ptr()


def test_a_time_a_hair_beyond_a_frame_is_that_frame_s(pack):
    """As of sums of floats: 0.1 + 0.2 seconds, times 30, is a little more than 9."""
    video = pack.nodes.frames_video.FramesVideo(torch.zeros(15, 16, 16, 3, dtype=torch.uint8), Fraction(30))
    assert video.as_trimmed(0.1 + 0.2).get_frame_count() == 6
    assert video.as_trimmed(0, 0.1 + 0.2).get_frame_count() == 9


def test_sound_is_trimmed_with_the_frames(ladder):
    full = ladder.get_components().audio["waveform"]
    part = ladder.as_trimmed(0.25, 0.5).get_components().audio
    assert part["sample_rate"] == 48000 and torch.equal(part["waveform"], full[..., 12000:36000])
    twice = ladder.as_trimmed(0.25, 0.75).as_trimmed(0.25, 0.25)
    assert numbers(twice.get_components().images) == [4, 5]
    assert torch.equal(twice.get_components().audio["waveform"], full[..., 24000:36000])


def test_sound_shorter_than_the_start_is_left_out(pack):
    frames = torch.zeros(9, 16, 16, 3, dtype=torch.uint8)
    video = pack.nodes.frames_video.FramesVideo(frames, Fraction(FPS), tone(0.25))
    assert video.as_trimmed(0.5, 0).get_components().audio is None


def test_trims_that_leave_nothing_or_less_than_asked(ladder):
    from comfy_extras.nodes_video import VideoSlice

    assert ladder.as_trimmed(2, 0) is None
    assert ladder.as_trimmed(0.5, 1.0, strict_duration=True) is None
    assert ladder.as_trimmed(0.5, 0.625, strict_duration=True).get_frame_count() == 5
    assert ladder.as_trimmed().get_frame_count() == 9
    assert VideoSlice.execute(ladder, 0.5, 0.25, True).result[0].get_frame_count() == 2
