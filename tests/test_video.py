"""Video and PNG output, read back with an independent decoder."""

import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from t3 import video
from t3.errors import T3Error
from t3.picture_planes import yuv420

av = pytest.importorskip("av")

WIDTH, HEIGHT = 96, 64
SETTINGS = {"width": WIDTH, "height": HEIGHT, "fps": 24}
KR, KB = 0.2126, 0.0722
COLOURS = [(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0.2, 0.5, 0.7), (0.9, 0.4, 0.1)]


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "Clips ünd 影"
    folder.mkdir()
    return folder


def noise(count=5):
    return np.random.default_rng(0).random((count, HEIGHT, WIDTH, 3))


def solid(*colours):
    return np.stack([np.broadcast_to(np.array(colour, np.float64), (HEIGHT, WIDTH, 3)) for colour in colours])


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, list(container.decode(stream))


def planes(frame):
    """Y, Cb and Cr as whole numbers."""
    dtype = "<u2" if "10" in frame.format.name else "u1"
    result = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        result.append(np.ascontiguousarray(rows).view(dtype)[: plane.height, : plane.width].astype(int))
    return result


def expected_planes(rgb, depth):
    """BT.709 limited range of one colour in [0, 1] (ITU-R BT.709-6, items 3.2 to 3.5)."""
    red, green, blue = rgb
    luma = KR * red + (1 - KR - KB) * green + KB * blue
    chroma = ((blue - luma) / (2 - 2 * KB), (red - luma) / (2 - 2 * KR))
    return [2 ** (depth - 8) * value for value in (16 + 219 * luma, *(128 + 224 * part for part in chroma))]


def to_rgb(frame, depth):
    """Decoded frame to RGB in [0, 1] by the inverse formulas; chroma is repeated, which is exact on solid colours."""
    luma, blue, red = (plane / 2 ** (depth - 8) for plane in planes(frame))
    luma = (luma - 16) / 219
    blue, red = (((part - 128) / 224).repeat(2, 0).repeat(2, 1) for part in (blue, red))
    r, b = luma + (2 - 2 * KR) * red, luma + (2 - 2 * KB) * blue
    return np.stack([r, (luma - KR * r - KB * b) / (1 - KR - KB), b], -1)


@pytest.mark.parametrize("path", ["a.mp4", "a.mkv", "a"])
def test_half_a_character_is_kept(place, path):
    """As in a prompt of broken JSON, or in a path of bytes that are no UTF-8."""
    about = {"prompt": "a \ud83d 影", "image": "caf\udce9.png"}
    with video.open_writer(place / path, metadata={"t3": about, "note": "half \ud83d 影"}, **SETTINGS) as writer:
        writer.write(noise(1))
    if path == "a":
        stored = json.loads((place / "a" / "metadata.json").read_text(encoding="utf-8"))
    else:
        with av.open(str(place / path)) as container:
            stored = {key.lower(): value for key, value in container.metadata.items()}
    assert json.loads(stored["t3"]) == about and stored["note"] == r"half \ud83d 影"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".MOV"])
@pytest.mark.parametrize(("codec", "decoder"), [("h264", "h264"), ("h265", "hevc")])
@pytest.mark.parametrize("depth", [8, 10])
def test_video_reads_back(place, suffix, codec, decoder, depth):
    path = place / f"a clip{suffix}"
    metadata = {"prompt": "ein Fuchs, 影", "workflow": {"1": [2]}}
    with video.open_writer(path, codec=codec, bit_depth=depth, metadata=metadata, **SETTINGS) as writer:
        assert isinstance(writer, video.VideoWriter)
        writer.write(noise(3))
        writer.write(torch.rand(4, HEIGHT, WIDTH, 3))
        assert not path.exists()
    assert writer.frames_written == 7 and os.listdir(place) == [path.name]

    stream, frames = decode(path)
    context = stream.codec_context
    assert len(frames) == 7
    assert stream.average_rate == 24
    assert (context.name, context.width, context.height) == (decoder, WIDTH, HEIGHT)
    assert context.pix_fmt == frames[0].format.name == ("yuv420p" if depth == 8 else "yuv420p10le")
    # BT.709 is 1 in all three, and 1 is limited range.
    assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
    with av.open(str(path)) as container:
        assert container.duration == pytest.approx(7 / 24 * 1e6, abs=1001)
        stored = {key.lower(): value for key, value in container.metadata.items()}
    assert stored["prompt"] == "ein Fuchs, 影" and json.loads(stored["workflow"]) == {"1": [2]}


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 30000 / 1001, 29.97, 16, 0.5])
def test_frame_rates(place, fps):
    with video.VideoWriter(place / "a.mp4", width=WIDTH, height=HEIGHT, fps=fps) as writer:
        writer.write(noise())
    stream, frames = decode(place / "a.mp4")
    assert stream.average_rate == video.frame_rate(fps)
    assert [frame.time for frame in frames] == pytest.approx([number / fps for number in range(5)], abs=1e-4)
    assert video.frame_rate(30000 / 1001) == Fraction(30000, 1001) and video.frame_rate(29.97) == Fraction(2997, 100)


@pytest.mark.parametrize("depth", [8, 10])
def test_conversion_is_bt709_to_half_a_step(depth):
    for colour in [*COLOURS, *np.random.default_rng(1).random((50, 3))]:
        frame = torch.from_numpy(solid(colour)[0]).float()
        for plane, value in zip(yuv420(frame, depth), expected_planes(colour, depth), strict=True):
            # Rounding is half a step; float32 adds less than a thousandth.
            assert np.abs(plane - value).max() <= 0.501


def test_chroma_is_sited_left_and_half_way_down():
    # A ramp along both axes: at the site of a sample the ramp's value is known exactly.
    y, x = np.mgrid[0:16, 0:24]
    rgb = np.zeros((16, 24, 3), np.float32)
    rgb[..., 2] = (x + 3 * y) / 100
    _, blue, _ = yuv420(torch.from_numpy(rgb), 10)
    site = (2 * np.arange(12)[None, :] + 3 * (2 * np.arange(8)[:, None] + 0.5)) / 100
    wanted = 4 * (128 + 224 * site / 2)
    assert np.abs(blue - wanted)[:, 1:].max() <= 0.501  # the first column has no left neighbour


@pytest.mark.parametrize("codec", ["h264", "h265"])
@pytest.mark.parametrize("depth", [8, 10])
def test_colours_survive(place, codec, depth):
    with video.VideoWriter(place / "a.mp4", codec=codec, bit_depth=depth, crf=0, **SETTINGS) as writer:
        writer.write(solid(*COLOURS))
    _, frames = decode(place / "a.mp4")
    for frame, colour in zip(frames, COLOURS, strict=True):
        for plane, value in zip(planes(frame), expected_planes(colour, depth), strict=True):
            # Half a step of rounding. At crf 0, 8-bit H.264 is lossless; the others quantise by at most a step.
            assert np.abs(plane - value).max() <= (0.501 if (codec, depth) == ("h264", 8) else 1.501)
        # Half a step in Y and Cb or Cr, at the largest weight a colour gives them (blue: 1.8556), and the encoder's.
        steps = 0.5 * (1 / 219 + 1.8556 / 224) / 2 ** (depth - 8)
        assert np.abs(to_rgb(frame, depth) - colour).max() <= 3.01 * steps


def test_an_independent_conversion_agrees(place):
    with video.VideoWriter(place / "a.mp4", crf=0, **SETTINGS) as writer:
        writer.write(solid(*COLOURS))
    for frame, colour in zip(decode(place / "a.mp4")[1], COLOURS, strict=True):
        pixels = frame.reformat(format="rgb24", src_colorspace="ITU709", dst_color_range="JPEG").to_ndarray()
        # 1.5 levels from half a step each of Y and chroma (2.1 in blue), and the converter's own rounding.
        assert np.abs(pixels.astype(float) - 255 * np.array(colour)).max() <= 3


def test_ten_bits_keep_more_levels(place):
    ramp = np.broadcast_to(np.linspace(0.4, 0.6, 256)[None, None, :, None], (2, HEIGHT, 256, 3))
    levels = {}
    for depth in (8, 10):
        path = place / f"{depth}.mp4"
        with video.VideoWriter(path, width=256, height=HEIGHT, fps=24, bit_depth=depth, crf=1) as writer:
            writer.write(ramp.astype(np.float32))
        levels[depth] = len(np.unique(planes(decode(path)[1][0])[0]))
    # A fifth of the 219 (876) steps of limited range.
    assert 40 <= levels[8] <= 48 and levels[10] >= 150


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: (x * 255).round().astype(np.uint8),
        lambda x: (x * 255).round().astype(np.uint16) * 257,
        lambda x: x.astype(np.float16),
        lambda x: torch.from_numpy(x).to(torch.bfloat16),
        lambda x: torch.from_numpy((x * 255).round().astype(np.uint8)),
        lambda x: torch.from_numpy((x * 255).round().astype(np.uint16) * 257),
        lambda x: np.broadcast_to(x, x.shape)[:, ::-1, ::-1],  # read-only, negative strides
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda x: x * 3 - 1,  # out of range on both sides: clipped
    ],
)
def test_kinds_of_frames(place, convert):
    frames = convert(solid((0, 0, 0), (1, 1, 1), (1, 0, 1)))
    before = frames.copy() if isinstance(frames, np.ndarray) else frames.clone()
    with video.PngWriter(place / "a", bit_depth=16, **SETTINGS) as writer:
        writer.write(frames)
    assert (frames == before).all()  # the caller's memory is not scratch space
    read = [decode(place / "a" / f"frame_{number:05}.png")[1][0].to_ndarray() for number in range(3)]
    assert (np.stack(read) == 65535 * solid((0, 0, 0), (1, 1, 1), (1, 0, 1))).all()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("size", [(48, 32), (47, 31), (1, 1)])
def test_png_is_exact(place, depth, size):
    frames = np.random.default_rng(2).random((21, size[1], size[0], 3))
    path = place / "frames.v2"
    options = {"bit_depth": depth, "metadata": {"prompt": "é", "seed": 7}}
    with video.PngWriter(path, width=size[0], height=size[1], fps=29.97, **options) as writer:
        writer.write(frames[:20])
        writer.write(frames[20:].astype(np.float32))
        assert not path.exists()
    assert os.listdir(place) == ["frames.v2"]
    assert sorted(os.listdir(path)) == [*(f"frame_{number:05}.png" for number in range(21)), "metadata.json"]
    top = 2**depth - 1
    for number, frame in enumerate(frames):
        file = path / f"frame_{number:05}.png"
        # Width, height, bits and colour type 2 (RGB), from the file's own header.
        assert struct.unpack(">II2B", file.read_bytes()[16:26]) == (*size, depth, 2)
        read = decode(file)[1][0].to_ndarray().astype(float)
        assert np.abs(read - frame * top).max() <= 0.51
    about = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    assert about == {"frames": 21, "fps": "2997/100", "prompt": "é", "seed": "7"}


@pytest.mark.parametrize("path", ["a.mp4", "a.mkv", "a"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_and_named(place, path, bad):
    frames = noise(4)
    frames[2, 5, 6, 1] = bad
    with pytest.raises(T3Error, match=r"Frame 6 .*1 values"), video.open_writer(place / path, **SETTINGS) as writer:
        writer.write(noise(4))
        writer.write(frames)
    assert os.listdir(place) == []


def test_large_finite_values_are_clipped_not_refused(place):
    frames = np.full((1, HEIGHT, WIDTH, 3), 3e38, np.float32)  # their sum overflows
    with video.PngWriter(place / "a", **SETTINGS) as writer:
        writer.write(frames)
    assert (decode(place / "a" / "frame_00000.png")[1][0].to_ndarray() == 255).all()


@pytest.mark.parametrize("path", ["a.mp4", "a"])
def test_a_clip_with_a_hole_is_not_published(place, path):
    with pytest.raises(T3Error, match="failed after 1 frames"), video.open_writer(place / path, **SETTINGS) as writer:
        writer.write(noise(1))
        with pytest.raises(T3Error):
            writer.write(noise(1) * np.nan)
    assert os.listdir(place) == []


@pytest.mark.parametrize("path", ["a.mp4", "a.mkv", "a.mov", "a"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("count", [0, 3])
def test_exception_leaves_nothing(place, path, error, count):
    with pytest.raises(error), video.open_writer(place / path, **SETTINGS) as writer:
        writer.write(noise(count))
        raise error
    assert os.listdir(place) == []


@pytest.mark.parametrize("path", ["a.mp4", "a"])
def test_no_frames_is_an_error(place, path):
    with pytest.raises(T3Error, match="no frame"), video.open_writer(place / path, **SETTINGS):
        pass
    assert os.listdir(place) == []


@pytest.mark.parametrize("path", ["a.mp4", "a.mkv", "a"])
def test_full_disk_leaves_nothing(place, path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"width": 256, "height": 256, "fps": 24}
    frames = np.random.default_rng(0).random((8, 256, 256, 3))
    writer = video.open_writer(place / path, **options)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        with pytest.raises(T3Error) as caught, writer:
            writer.write(frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "failed after" in str(caught.value) and "free space" in str(caught.value)
    assert os.listdir(place) == []


@pytest.mark.parametrize("path", ["a.mp4", "a"])
def test_existing_output_is_refused_untouched_or_replaced(place, path):
    with video.open_writer(place / path, **SETTINGS) as writer:
        writer.write(noise(3))
    file = place / path if path.endswith(".mp4") else place / path / "frame_00002.png"
    before = file.read_bytes()
    with pytest.raises(T3Error, match="exists"):
        video.open_writer(place / path, **SETTINGS)
    assert file.read_bytes() == before
    with pytest.raises(RuntimeError), video.open_writer(place / path, overwrite=True, **SETTINGS) as writer:
        writer.write(noise(1))
        raise RuntimeError
    assert file.read_bytes() == before
    with video.open_writer(place / path, overwrite=True, **SETTINGS) as writer:
        writer.write(noise(2))
    assert os.listdir(place) == [path]
    assert len(decode(file)[1]) == 2 if path.endswith(".mp4") else not file.exists()


def test_mp4_index_comes_first(place):
    with video.VideoWriter(place / "a.mp4", **SETTINGS) as writer:
        writer.write(noise())
    data = (place / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    "shape", [(HEIGHT, WIDTH, 3), (1, HEIGHT, WIDTH, 4), (1, WIDTH, HEIGHT, 3), (1, 2, 3, HEIGHT, 3)]
)
def test_wrong_shapes(place, shape):
    with (
        pytest.raises(T3Error, match=rf"\[n, {HEIGHT}, {WIDTH}, 3\]"),
        video.VideoWriter(place / "a.mp4", **SETTINGS) as writer,
    ):
        writer.write(np.zeros(shape))


def test_wrong_dtype(place):
    with pytest.raises(T3Error, match="int64"), video.VideoWriter(place / "a.mp4", **SETTINGS) as writer:
        writer.write(np.zeros((1, HEIGHT, WIDTH, 3), np.int64))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a.mp4", "video"),
        ("b/a.b.MKV", "video"),
        ("a.mov", "video"),
        ("a", "frames"),
        ("v1.5/", "frames"),
        ("a.mp4/", "frames"),
    ],
)
def test_legal_paths(path, kind):
    assert video.check_video_path(path) == kind


@pytest.mark.parametrize("path", ["a.webm", "v1.5", ".mp4", "a.png"])
def test_illegal_paths(path):
    with pytest.raises(T3Error, match=r"\.mp4, \.mkv, \.mov"):
        video.check_video_path(path)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("a.mp4", {"width": 97}, "96 x 64"),
        ("a.mp4", {"height": 65}, "96 x 64"),
        ("a.mp4", {"width": 8}, "16 to 16384"),
        ("a.mp4", {"width": 48, "codec": "h265"}, "64 to 16384"),
        ("a", {"width": 0}, "1 to 16384"),
        ("a.mp4", {"fps": 0}, "0.01 to 1000"),
        ("a.mp4", {"fps": float("nan")}, "frame rate"),
        ("a.mp4", {"fps": float("inf")}, "frame rate"),
        ("a.mp4", {"fps": 5000}, "0.01 to 1000"),
        ("a", {"fps": "fast"}, "frame rate"),
        ("a.mp4", {"codec": "vp9"}, "h264 or h265"),
        ("a.mp4", {"bit_depth": 16}, "8 or 10"),
        ("a", {"bit_depth": 10}, "8 or 16"),
        ("a.mp4", {"crf": 60}, "crf 60"),
        ("a", {"crf": 20}, "no crf"),
        ("a", {"codec": "h264"}, "no codec"),
        ("a.gif", {}, "a.gif"),
        ("a.mp4", {"need_bytes": 2**80}, "free on that disk"),
    ],
)
def test_checks_before_any_work(place, path, changes, message):
    with pytest.raises(T3Error, match=message):
        video.check_video(place / path, **(SETTINGS | changes))
    if "need_bytes" not in changes:
        with pytest.raises(T3Error, match=message):
            video.open_writer(place / path, **(SETTINGS | changes))
    assert os.listdir(place) == []


def test_writers_take_only_their_own_paths(place):
    with pytest.raises(T3Error, match="names a folder"):
        video.VideoWriter(place / "a", **SETTINGS)
    assert video.PngWriter(place / "a.mp4", **SETTINGS).path == place / "a.mp4"


def test_crop():
    assert video.crop_rows(2176) == (8, 8)
    assert video.crop_rows(2160) == (0, 0)
    assert video.crop_rows(11, 8) == (1, 2)
    with pytest.raises(T3Error, match=r"704 rows.*2160"):
        video.crop_rows(704)
    frames = torch.arange(11).view(1, 11, 1, 1).expand(2, 11, 4, 3)
    cropped = video.crop_frames(frames, 8)
    assert cropped.shape == (2, 8, 4, 3) and cropped[0, :, 0, 0].tolist() == list(range(1, 9))
    assert (video.crop_frames(frames.numpy(), 8) == cropped.numpy()).all()
    with pytest.raises(T3Error):
        video.crop_frames(frames, 12)


def test_checks_load_nothing_heavy():
    code = (
        "import sys; from t3 import files, latents, prompts, video; "
        "video.check_video('nowhere-made.mp4', width=64, height=64, fps=24); "
        "sys.exit(str([name for name in ('torch', 'av', 'numpy', 'PIL') if name in sys.modules] or ''))"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stderr.strip() == ""
