"""Clips as people have them: turned phones, wide pixels, uneven frame rates, odd names and tables."""

import csv
import io
import json
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from t3.errors import T3Error
from t3.retrofit.buckets import Bucket, choose
from t3.retrofit.clips import BadClip, inspect_clip, list_clips, read_clip

HEIGHT, WIDTH = 96, 160
RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 220, 30), (30, 30, 220), (235, 235, 235)
MILLISECOND = Fraction(1, 1000)
ONE = 0x10000
STRAIGHT = (ONE, 0, 0, ONE)  # a, b, c, d: the pixel (x, y) is shown at (a x + c y, b x + d y)


def write_video(path, times, *, picture=None, pixel_shape=None, matrix=STRAIGHT, rate=None, bframes=0):
    """A clip with frames at `times`, in milliseconds or, with a rate, by number. Without a picture each frame is grey,
    of 8 times its number."""
    time_base = MILLISECOND if rate is None else 1 / Fraction(rate)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate or 30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"crf": "4", "bf": str(bframes)}
        stream.time_base = stream.codec_context.time_base = time_base
        if pixel_shape:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        for number, time in enumerate(times):
            level = np.full((HEIGHT, WIDTH, 3), 8 * number % 256, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(level if picture is None else picture, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if matrix != STRAIGHT:
        # The matrix in the header of an MP4's track; no writer of PyAV's sets it.
        whole = path.read_bytes()
        place = whole.index(_matrix(STRAIGHT), whole.index(b"tkhd"))
        path.write_bytes(whole[:place] + _matrix(matrix) + whole[place + 36 :])
    return path


def _matrix(numbers):
    a, b, c, d = numbers
    return struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)


def quarters(top_left, top_right, bottom_left, bottom_right):
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for rows, columns, color in (
        (slice(0, 48), slice(0, 80), top_left),
        (slice(0, 48), slice(80, 160), top_right),
        (slice(48, 96), slice(0, 80), bottom_left),
        (slice(48, 96), slice(80, 160), bottom_right),
    ):
        picture[rows, columns] = color
    return picture


def corners(frame):
    """The colour names of a picture's four corners, by rows."""
    names = {RED: "red", GREEN: "green", BLUE: "blue", WHITE: "white"}
    height, width, _ = frame.shape
    spots = [frame[y, x].int() for y in (height // 8, -height // 8) for x in (width // 8, -width // 8)]
    return " ".join(names[min(names, key=lambda name: int((torch.tensor(name) - spot).abs().sum()))] for spot in spots)


def taken(path, count, fps):
    """The numbers of the frames that are read."""
    levels = read_clip(path, Bucket(HEIGHT, WIDTH, count), fps).float().mean((0, 2, 3, 4))
    return [round(level / 8) for level in levels.tolist()]


# What ffmpeg, which turns pictures by itself, gives of the same files.
@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        (STRAIGHT, "red green blue white"),
        ((0, ONE, -ONE, 0), "blue red white green"),  # a phone held upright: a quarter turn clockwise
        ((0, -ONE, ONE, 0), "green white red blue"),
        ((-ONE, 0, 0, -ONE), "white blue green red"),
        ((-ONE, 0, 0, ONE), "green red white blue"),  # mirrored
        ((ONE, 0, 0, -ONE), "blue white red green"),
        ((0, ONE, ONE, 0), "red blue green white"),
    ],
)
def test_pictures_stand_upright(tmp_path, matrix, shown):
    path = write_video(tmp_path / "a.mp4", range(0, 300, 33), picture=quarters(RED, GREEN, BLUE, WHITE), matrix=matrix)
    upright = matrix[0] == 0
    video, count = inspect_clip(path, None)
    assert (video.height, video.width, count) == ((WIDTH, HEIGHT, 10) if upright else (HEIGHT, WIDTH, 10))
    bucket = choose(video.height, video.width, count, [(HEIGHT, WIDTH), (WIDTH, HEIGHT)], [5], False)
    assert (bucket.height > bucket.width) == upright
    frames = read_clip(path, bucket, None)
    assert {corners(frame) for frame in frames[0]} == {shown}


def test_a_clip_that_leans_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(0, 100, 33), matrix=(46341, 46341, -46341, 46341))
    for look in (lambda: inspect_clip(path, None), lambda: read_clip(path, Bucket(HEIGHT, WIDTH, 1), None)):
        with pytest.raises(BadClip, match="an angle other than 90, 180 or 270"):
            look()


@pytest.mark.parametrize(
    ("pixel_shape", "matrix", "size"),
    [
        (Fraction(2, 1), STRAIGHT, (96, 320)),
        (Fraction(1, 2), STRAIGHT, (192, 160)),
        (Fraction(2, 1), (0, ONE, -ONE, 0), (320, 96)),
        (Fraction(1281, 1280), STRAIGHT, (96, 160)),
    ],
)
def test_pixels_that_are_not_square(tmp_path, pixel_shape, matrix, size):
    """A square of coded pixels in the middle is as wide and high as it is shown."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[24:72, 56:104] = 235
    path = write_video(tmp_path / "a.mp4", [0, 33, 66], picture=picture, pixel_shape=pixel_shape, matrix=matrix)
    video, count = inspect_clip(path, None)
    assert (video.height, video.width) == size
    assert choose(*size, count, [(96, 160), size], [3], False) == Bucket(*size, 3)
    light = read_clip(path, Bucket(*size, 3), None)[0, 0].float().mean(-1) > 128
    height, width = int(light.any(1).sum()), int(light.any(0).sum())
    assert (height, width) == pytest.approx((48 * size[0] / (WIDTH if matrix[0] == 0 else HEIGHT),
                                             48 * size[1] / (HEIGHT if matrix[0] == 0 else WIDTH)), abs=2)  # fmt: skip


def test_pixels_of_an_impossible_shape_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", [0, 33], pixel_shape=Fraction(50, 1))
    with pytest.raises(BadClip, match="50 times as wide as high"):
        inspect_clip(path, None)


def test_frames_are_taken_by_their_times(tmp_path):
    # A hundred frames a second at first, and then twelve and a half.
    times = [10 * i for i in range(15)] + [220 + 80 * i for i in range(15)]
    path = write_video(tmp_path / "a.mp4", times)
    assert inspect_clip(path, 10.0)[1] == 14
    asked = [100 * i for i in range(14)]
    nearest = [min(range(30), key=lambda i: (abs(times[i] - time), -i)) for time in asked]
    assert taken(path, 14, 10.0) == nearest
    assert nearest[:5] == [0, 10, 15, 16, 17]
    assert inspect_clip(path, 10.0, 9)[1] == 9
    with pytest.raises(BadClip, match="broke off after 14 of 15"):
        taken(path, 15, 10.0)
    # Every frame, whatever the times.
    assert inspect_clip(path, None)[1] == 30
    assert taken(path, 30, None) == list(range(30))


def test_the_first_frame_of_a_clip_is_at_no_time(tmp_path):
    path = write_video(tmp_path / "a.mkv", [1000 + 40 * i for i in range(20)])
    assert inspect_clip(path, 5.0)[1] == 4
    assert taken(path, 4, 5.0) == [0, 5, 10, 15]


def test_a_clip_with_a_gap_is_skipped_and_says_where(tmp_path):
    path = write_video(tmp_path / "a.mp4", [*range(0, 400, 20), *range(800, 1600, 20)])
    assert inspect_clip(path, 10.0, 4)[1] == 4
    for look in (lambda: inspect_clip(path, 10.0), lambda: taken(path, 8, 10.0)):
        with pytest.raises(BadClip, match=r"at 0.50 seconds it has fewer frames a second than --fps asks for"):
            look()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(
    ("rate", "fps"),
    [(60, 24.0), (24, 16.0), (30, 16.0), (25, 25.0), (Fraction(30000, 1001), 16.0), (Fraction(24000, 1001), 24.0)],
)
def test_an_even_frame_rate_is_thinned_by_number(tmp_path, suffix, rate, fps):
    """Whatever the container's ticks are, and with frames that are stored in another order than shown."""
    path = write_video(tmp_path / f"a.{suffix}", range(30), rate=rate, bframes=2)
    count = min(int(29 * fps / float(rate) + 1e-6) + 1, 30)
    assert inspect_clip(path, fps)[1] == count
    assert taken(path, count, fps) == [int(i * float(rate) / fps + 0.5) for i in range(count)]


def test_captions_of_several_lines_and_odd_separators_in_a_csv(tmp_path):
    captions = ["A red square.\nIt moves left.", "one\u2028two", "a\x0bb\x85c", "three"]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["file", "caption"], *([f"{i}.mp4", caption] for i, caption in enumerate(captions))])
    (tmp_path / "list.csv").write_bytes(text.getvalue().encode())
    found = [(clip.source, clip.caption) for clip in list_clips(tmp_path / "list.csv")]
    assert found == [(f"{i}.mp4", caption) for i, caption in enumerate(captions)]
    (tmp_path / "lines.csv").write_text('file,caption\n1.mp4,"two\nlines"\n,no file\n')
    with pytest.raises(T3Error, match="lines.csv, entry 4, names no file"):
        list_clips(tmp_path / "lines.csv")
    (tmp_path / "huge.csv").write_text("file,caption\n1.mp4," + "x" * 200_000)
    with pytest.raises(T3Error, match="huge.csv, line 2, is broken CSV: field larger"):
        list_clips(tmp_path / "huge.csv")


def test_halves_of_characters_in_captions_and_names(tmp_path):
    lines = ['{"file": "1.mp4", "caption": "a cat \\ud83d"}', '{"file": "2.mp4", "caption": "a dog \\ud83d\\ude00"}']
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, '{"file": "\\ud83d.mp4", "caption": "c"}']))
    clips = list_clips(tmp_path / "list.jsonl")
    assert [clip.caption for clip in clips] == ["a cat \ufffd", "a dog \U0001f600", "c"]
    assert [clip.source for clip in clips] == ["1.mp4", "2.mp4", "\\ud83d.mp4"]
    with pytest.raises(BadClip) as caught:
        inspect_clip(clips[2].path, None)
    str(caught.value).encode()


@pytest.mark.skipif(os.name == "nt", reason="its file names are Unicode")
def test_files_whose_names_are_not_utf8(tmp_path):
    source = write_video(tmp_path / "a.mp4", [0, 33, 66])
    try:
        for name in (b"caf\xe9.mp4", b"caf\xe8.mp4"):
            source.with_name(os.fsdecode(name)).write_bytes(source.read_bytes())
    except OSError:
        pytest.skip("this disk takes UTF-8 alone")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a cup")
    (tmp_path / os.fsdecode(b"broken\xe9.mp4")).write_bytes(b"no video")
    clips = {clip.source: clip for clip in list_clips(tmp_path)}
    assert sorted(clips) == ["a.mp4", "broken\\udce9.mp4", "caf\\udce8.mp4", "caf\\udce9.mp4"]
    cup = clips["caf\\udce9.mp4"]
    assert cup.caption == "a cup"
    assert inspect_clip(cup.path, None)[1] == 3
    assert read_clip(cup.path, Bucket(32, 48, 3), None).shape == (1, 3, 32, 48, 3)
    with pytest.raises(BadClip) as caught:
        inspect_clip(clips["broken\\udce9.mp4"].path, None)
    str(caught.value).encode()
    json.dumps([clip.source for clip in clips.values()], ensure_ascii=False).encode()
    (tmp_path / "caf\\udce9.mp4").write_bytes(b"named like what the other prints as")
    with pytest.raises(T3Error, match="two files that print as"):
        list_clips(tmp_path)
