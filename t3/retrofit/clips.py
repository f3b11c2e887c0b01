"""Clips to encode and their captions, from a folder, a CSV or JSON lines; and the frames of one."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import T3Error

if TYPE_CHECKING:
    import torch

    from .buckets import Bucket

VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif")
FILE_KEYS = ("file", "video", "path", "file_name")
CAPTION_KEYS = ("caption", "text", "prompt")
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # no encoding has them: of a name that is not UTF-8, or broken JSON
_SAME = 1e-6  # of a frame: numbers that are equal but for rounding


class BadClip(T3Error):
    """A clip cannot be read; the message says why."""


@dataclass(frozen=True)
class Clip:
    """A file and its caption, None where there is none. `source`: its name in the data set, which can be printed."""

    path: Path
    caption: str | None
    source: str


@dataclass(frozen=True)
class Video:
    """A video as it is shown, upright and with square pixels. fps: the frames of a second, on average."""

    height: int
    width: int
    fps: float


def list_clips(path: str | Path) -> list[Clip]:
    """The clips of a folder, a `.csv`, a `.jsonl` or a `.json`, in a fixed order.

    Folder: every video in it and below; the caption of `a.mp4` is the text of `a.txt`. Tables: one clip a line, the
    file (from the table's folder) under "file", "video", "path" or "file_name", its caption under "caption", "text" or
    "prompt". A file whose name is not UTF-8 has its bytes as `\\udcXX` in its source; halves of characters in a
    caption, which broken JSON may hold, become U+FFFD. Raises `T3Error` for a list that is missing, empty or broken, or
    a line without a file.
    """
    root = Path(path).absolute()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in VIDEOS)
        clips = [Clip(file, _beside(file), _printable(file.relative_to(root).as_posix())) for file in files]
    elif not root.is_file():
        raise T3Error(f"{root} does not exist. Give a folder of clips, a .csv or a .jsonl.")
    elif root.suffix.lower() in (".csv", ".jsonl", ".ndjson", ".json"):
        clips = [_entry(root, number, entry) for number, entry in _table(root)]
    else:
        raise T3Error(f"{root} is no list of clips. Give a folder, a .csv, a .jsonl or a .json.")
    if not clips:
        raise T3Error(f"{root} holds no clip. Videos end in {', '.join(VIDEOS)}.")
    files_by_source: dict[str, Path] = {}
    for clip in clips:
        other = files_by_source.setdefault(clip.source, clip.path)
        if other != clip.path:
            raise T3Error(f"{root} holds two files that print as {clip.source}. Rename one of them.")
    return clips


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise T3Error(f"the caption {text} cannot be read: {error}. Save it as UTF-8.") from None


def _table(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise T3Error(f"{file} cannot be read: {error}. Save it as UTF-8.") from None
    if file.suffix.lower() == ".csv":
        # Not by lines: a caption in quotes may go over several.
        rows = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            broken = rows.reader.line_num  # `rows` knows the last good one's
            raise T3Error(f"{file}, line {broken}, is broken CSV: {error}. Correct it there.") from None
        return
    try:
        if file.suffix.lower() == ".json":
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line)
    except (json.JSONDecodeError, TypeError) as error:
        raise T3Error(f"{file} is broken JSON: {error}. Correct it there.") from None


def _entry(table: Path, number: int, entry: Any) -> Clip:
    if not isinstance(entry, dict):
        raise T3Error(f"{table}, entry {number}, is {entry!r}; expected a file and a caption by name.")
    name = next((entry[key] for key in FILE_KEYS if entry.get(key)), None)
    if not isinstance(name, str):
        raise T3Error(f"{table}, entry {number}, names no file. Put it under {', '.join(map(repr, FILE_KEYS))}.")
    caption = next((entry[key] for key in CAPTION_KEYS if entry.get(key)), None)
    text = _HALF_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", caption).strip() if isinstance(caption, str) else None
    return Clip(table.parent / name, text or None, _printable(name))


def inspect_clip(path: Path, fps: float | None, most: int | None = None) -> tuple[Video, int]:
    """How a clip is shown, and how many frames `read_clip` gets of it at `fps`; it looks no further than `most`.

    The frames are decoded, since a header's count and duration are often wrong or missing, and which are near to the
    times that `fps` asks for is known by their own times alone. Raises `BadClip`.
    """
    from PIL.Image import Transpose

    with _opened(path) as container:
        stream = _stream(container)
        frames = islice(_frames(container, stream, fps), most)
        first = next(frames, None)
        if first is None:
            raise BadClip("it has no frames")
        width, height = _square(first.width, first.height, stream)
        if Transpose.TRANSPOSE in _turns(first):
            width, height = height, width
        return Video(height, width, _rate(stream)), 1 + sum(1 for _ in frames)


def read_clip(path: Path, bucket: Bucket, fps: float | None) -> torch.Tensor:
    """The first frames of a clip as it is shown, scaled and cropped about the centre: uint8 `[1, frames, H, W, 3]`.

    fps: of the clip's frames those nearest in time to this rate; None takes every one. Raises `BadClip`.
    """
    import torch
    from PIL import Image, ImageOps

    frames: list[torch.Tensor] = []
    turns: list[Any] | None = None
    with _opened(path) as container:
        stream = _stream(container)
        for frame in islice(_frames(container, stream, fps), bucket.frames):
            # The first frame's are all frames', since the bucket was chosen by it.
            turns = _turns(frame) if turns is None else turns
            image = frame.to_image()
            size = _square(image.width, image.height, stream)
            if size != image.size:
                image = image.resize(size, Image.Resampling.LANCZOS)
            for turn in turns:
                image = image.transpose(turn)
            image = ImageOps.fit(image, (bucket.width, bucket.height), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            frames.append(pixels.view(bucket.height, bucket.width, 3))
    if len(frames) < bucket.frames:
        raise BadClip(f"it broke off after {len(frames)} of {bucket.frames} frames")
    return torch.stack(frames)[None]


def _frames(container: Any, stream: Any, fps: float | None) -> Iterator[Any]:
    """The frames to take: every one, or at `fps` from the first on, each time the nearest; none is taken twice."""
    decoded = _readable(container.decode(stream))
    rate = _rate(stream)
    if fps is None:
        yield from decoded
        return
    # Places count frames of the average length. Frames that are further apart than those asked for would be repeated.
    step = rate / fps
    if step < 1 - 1e-3:
        raise BadClip("it has fewer frames a second than --fps asks for")
    taken = 0
    before: tuple[Any, float] | None = None  # the last frame that was not taken, and its place
    for frame, place in _places(decoded, container, stream, rate):
        while frame is not None and place >= taken * step - _SAME:
            late = place - taken * step
            if before is not None and taken * step - before[1] < late - _SAME:
                yield before[0]
                before = None
            elif late > step - _SAME:
                raise BadClip(f"at {taken / fps:.2f} seconds it has fewer frames a second than --fps asks for")
            else:
                yield frame
                frame = None
            taken += 1
        before = None if frame is None else (frame, place)


def _places(decoded: Iterator[Any], container: Any, stream: Any, rate: float) -> Iterator[tuple[Any, float]]:
    """Each frame and its place: its time since the first, in frames of the average length."""
    if container.format.name == "avi":
        # It has no times but that of each frame's data, which are in another order. Frames are evenly apart there.
        for number, frame in enumerate(decoded):
            yield frame, float(number)
        return
    tick = float(stream.time_base) * rate
    start = last = None
    for frame in decoded:
        if frame.time is None or (last is not None and frame.time < last):
            raise BadClip("its frames have no times, or times that run backwards, and --fps takes them by their times")
        start, last = frame.time if start is None else start, frame.time
        place = (frame.time - start) * rate
        # Times are rounded to the container's ticks, which must not decide between two frames that are equally near.
        even = round(place)
        yield frame, float(even) if abs(place - even) <= min(tick, 0.1) else place


def _rate(stream: Any) -> float:
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not rate:
        raise BadClip("it has no frame rate")
    return rate


def _square(width: int, height: int, stream: Any) -> tuple[int, int]:
    """The size at which pixels are square, as players show it: one side is enlarged, none is reduced."""
    shape = float(stream.sample_aspect_ratio or 1)
    if not 0.1 <= shape <= 10:
        raise BadClip(f"its pixels are said to be {shape:g} times as wide as high")
    return round(width * max(shape, 1.0)), round(height / min(shape, 1.0))


def _turns(frame: Any) -> list[Any]:
    """What is to be done to a frame's picture, in PIL's words, to show it as the camera was held."""
    from PIL.Image import Transpose

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return []
    # The pixel (x, y) is shown at (a x + c y, b x + d y), but for a shift.
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    along, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(along, across) > 0.02 * max(along, across):
        raise BadClip("it is to be shown turned by an angle other than 90, 180 or 270 degrees")
    x, y = (c, b) if across > along else (a, d)
    steps = (
        (Transpose.TRANSPOSE, across > along),
        (Transpose.FLIP_LEFT_RIGHT, x < 0),
        (Transpose.FLIP_TOP_BOTTOM, y < 0),
    )
    return [step for step, needed in steps if needed]


def _opened(path: Path) -> Any:
    import av

    try:
        return av.open(str(path))
    except FileNotFoundError:
        raise BadClip("there is no such file") from None
    except (OSError, ValueError) as error:  # av's own errors derive from these
        raise BadClip(f"it cannot be opened ({_printable(str(error))})") from None


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise BadClip("it has no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _readable(parts: Iterable[Any]) -> Iterator[Any]:
    """What a container gives, with its errors as `BadClip`."""
    import av

    try:
        yield from parts
    except av.FFmpegError as error:
        raise BadClip(f"it cannot be decoded ({error})") from None
