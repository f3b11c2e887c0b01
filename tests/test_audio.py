"""Sound in video files, read back with an independent decoder."""

import math

import numpy as np
import pytest
import torch

from t3.audio import Audio
from t3.errors import T3Error
from t3.video import VideoWriter

av = pytest.importorskip("av")
FPS = 8


def rising_tone(seconds, rate=48000, channels=2):
    """Every place of it is another."""
    time = torch.arange(round(seconds * rate)) / rate
    return Audio((0.5 * torch.sin(2 * math.pi * (200 + 300 * time) * time)).repeat(channels, 1), rate)


def write(path, audio, frames=16):
    with VideoWriter(path, width=16, height=16, fps=FPS, audio=audio) as writer:
        for _ in range(frames):
            writer.write(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))


def sound_of(path):
    """Samples `[channels, n]` and their rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1), stream.rate


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(("channels", "rate"), [(1, 48000), (2, 44100), (6, 48000), (2, 16000)])
def test_sound_arrives_in_place(tmp_path, suffix, channels, rate):
    audio = rising_tone(2, rate, channels)
    write(tmp_path / f"x{suffix}", audio)
    found, found_rate = sound_of(tmp_path / f"x{suffix}")
    assert found_rate == rate and found.shape[0] == channels
    assert abs(found.shape[1] - 2 * rate) <= 2048
    if suffix != ".mkv":  # there the encoder's start is played too
        length = min(found.shape[1], 2 * rate)
        for channel in range(channels if channels < 6 else 3):  # the fourth of six is for low tones only
            assert np.corrcoef(found[channel, :length], audio.waveform[0, :length].numpy())[0, 1] > 0.95


def test_rates_that_aac_has_not_are_resampled(tmp_path):
    write(tmp_path / "x.mp4", rising_tone(2, 37800))
    found, rate = sound_of(tmp_path / "x.mp4")
    length = min(found.shape[1], 2 * 48000)
    assert rate == 48000 and length > 1.95 * 48000
    assert np.corrcoef(found[0, :length], rising_tone(2, 48000).waveform[0, :length].numpy())[0, 1] > 0.95


@pytest.mark.parametrize(("seconds", "expected"), [(5, 2), (0.5, 0.5), (2, 2)])
def test_sound_ends_with_the_picture_at_the_latest(tmp_path, seconds, expected):
    write(tmp_path / "x.mp4", rising_tone(seconds))
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 16
        audio, video = container.streams.audio[0], container.streams.video[0]
        assert abs(float(audio.duration * audio.time_base) - expected) < 0.05
        assert float(video.duration * video.time_base) == 2


def test_sound_and_picture_lie_side_by_side_in_the_file(tmp_path):
    """So that players read it in one go; a minute is longer than what the muxer sorts by itself."""
    write(tmp_path / "x.mp4", rising_tone(60, 8000, 1), frames=60 * FPS)
    apart, last = 0.0, {"audio": 0.0, "video": 0.0}
    with av.open(str(tmp_path / "x.mp4")) as container:
        packets = [
            (packet.pos, packet.stream.type, float(packet.dts * packet.time_base))
            for packet in container.demux()
            if packet.dts is not None
        ]
    for _, kind, seconds in sorted(packets):
        last[kind] = seconds
        apart = max(apart, abs(last["audio"] - last["video"]))
    assert apart < 11


def test_without_sound_there_is_no_stream_for_it(tmp_path):
    write(tmp_path / "x.mp4", None)
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize(
    ("waveform", "rate", "words"),
    [
        (torch.zeros(3, 100), 48000, "has 3 channels. A video takes 1, 2 or 6"),
        (torch.zeros(2, 0), 48000, r"has the shape \[2, 0\]"),
        (torch.zeros(100), 48000, r"has the shape \[100\]"),
        (torch.tensor([[0.0, math.nan, math.inf]]), 48000, "2 samples of the audio are NaN or infinite"),
        (torch.zeros(2, 100), 0, "0 samples per second"),
    ],
)
def test_what_no_file_holds_is_refused_at_once(tmp_path, waveform, rate, words):
    with pytest.raises(T3Error, match=words) as caught:
        VideoWriter(tmp_path / "x.mp4", width=16, height=16, fps=FPS, audio=Audio(waveform, rate))
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_half_precision_and_strided_sound(tmp_path):
    audio = rising_tone(2)
    write(tmp_path / "x.mp4", Audio(audio.waveform.half().T.contiguous().T, 48000))
    found, _ = sound_of(tmp_path / "x.mp4")
    assert np.corrcoef(found[1, :90000], audio.waveform[1, :90000].numpy())[0, 1] > 0.95
