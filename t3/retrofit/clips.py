"""Clips to encode and their captions, from a folder, a CSV or JSON lines; and the frames of one."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import T3Error

if TYPE_CHECKING:
    import torch

    from .buckets import Bucket

VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif")
FILE_KEYS = ("file", "video", "path", "file_name")
CAPTION_KEYS = ("caption", "text", "prompt")


class BadClip(T3Error):
    """A clip cannot be read; the message says why."""


@dataclass(frozen=True)
class Clip:
    """A file and its caption, None where there is none. `source`: its name in the data set."""

    path: Path
    caption: str | None
    source: str


@dataclass(frozen=True)
class Video:
    """What a file says of its video."""

    height: int
    width: int
    fps: float


def list_clips(path: str | Path) -> list[Clip]:
    """The clips of a folder, a `.csv`, a `.jsonl` or a `.json`, in a fixed order.

    Folder: every video in it and below; the caption of `a.mp4` is the text of `a.txt`. Tables: one clip a line, the
    file (from the table's folder) under "file", "video", "path" or "file_name", its caption under "caption", "text" or
    "prompt". Raises `T3Error` for a list that is missing, empty or broken, or a line without a file.
    """
    root = Path(path).absolute()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in VIDEOS)
        clips = [Clip(file, _beside(file), file.relative_to(root).as_posix()) for file in files]
    elif not root.is_file():
        raise T3Error(f"{root} does not exist. Give a folder of clips, a .csv or a .jsonl.")
    elif root.suffix.lower() in (".csv", ".jsonl", ".ndjson", ".json"):
        clips = [_entry(root, number, entry) for number, entry in _table(root)]
    else:
        raise T3Error(f"{root} is no list of clips. Give a folder, a .csv, a .jsonl or a .json.")
    if not clips:
        raise T3Error(f"{root} holds no clip. Videos end in {', '.join(VIDEOS)}.")
    return clips


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
        yield from enumerate(csv.DictReader(text.splitlines()), 2)
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
    text = caption.strip() if isinstance(caption, str) else None
    return Clip(table.parent / name, text or None, name)


def inspect_clip(path: Path, fps: float | None) -> tuple[Video, int]:
    """What a clip says of itself, and how many frames it gives at `fps` (all of them if None).

    Frames are counted by reading the packets, since a header's count and duration are often wrong or missing.
    Raises `BadClip`.
    """
    with _opened(path) as container:
        stream = _stream(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        count = sum(1 for packet in _readable(container.demux(stream)) if packet.size)
        if not rate or not count:
            raise BadClip("it has no frames, or no frame rate")
        video = Video(stream.height, stream.width, rate)
    return video, count if fps is None else int((count - 1) * fps / rate + 1e-6) + 1


def read_clip(path: Path, bucket: Bucket, fps: float | None) -> torch.Tensor:
    """The first frames of a clip, scaled and cropped about the centre: uint8 `[1, frames, H, W, 3]`.

    fps: frames are taken at this rate, the nearest that the clip has; None takes every one. Raises `BadClip`.
    """
    import torch
    from PIL import Image, ImageOps

    frames: list[torch.Tensor] = []
    with _opened(path) as container:
        stream = _stream(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        wanted = _places(bucket.frames, 1.0 if fps is None else rate / fps)
        for number, frame in enumerate(_readable(container.decode(stream))):
            if number < wanted[len(frames)]:
                continue
            image = ImageOps.fit(frame.to_image(), (bucket.width, bucket.height), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            frames.append(pixels.view(bucket.height, bucket.width, 3))
            if len(frames) == bucket.frames:
                return torch.stack(frames)[None]
    raise BadClip(f"it broke off after {len(frames)} of {bucket.frames} frames")


def _places(count: int, step: float) -> list[int]:
    """Numbers of the frames to take; a step below 1 would repeat frames, which no clip is asked for."""
    if step < 1 - 1e-3:
        raise BadClip("it has fewer frames a second than --fps asks for")
    return [int(i * step + 0.5) for i in range(count)]


def _opened(path: Path) -> Any:
    import av

    try:
        return av.open(str(path))
    except FileNotFoundError:
        raise BadClip("there is no such file") from None
    except (OSError, ValueError) as error:  # av's own errors derive from these
        raise BadClip(f"it cannot be opened ({error})") from None


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise BadClip("it has no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _readable(parts: Iterator[Any]) -> Iterator[Any]:
    """What a container gives, with its errors as `BadClip`."""
    import av

    try:
        yield from parts
    except av.FFmpegError as error:
        raise BadClip(f"it cannot be decoded ({error})") from None
