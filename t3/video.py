"""Frames to a file: H.264 or H.265 video, or a folder of PNG images.

Both writers take frames in pieces, hold about one frame at a time, and leave nothing under the final name until
they are closed without an error. `check_video` finds everything that can be wrong beforehand, without loading av.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .audio import Audio, AudioTrack
from .errors import T3Error
from .files import atomic_folder, atomic_path, check_output, check_output_folder, json_text, reason, utf8_text

if TYPE_CHECKING:
    import numpy
    import torch

_FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
SUFFIXES = tuple(_FORMATS)
_ENCODERS = {"h264": "libx264", "h265": "libx265"}
# Visually lossless for most material. x265 reaches equal quality at a somewhat higher number.
_CRF = {"h264": 17, "h265": 19}
_SMALLEST = {"h264": 16, "h265": 64}  # x265 4.2 writes past its buffers at a width of 48 (AVX cuTree)
_PNG_FILES = ("frame_*.png", "metadata.json")
_BT709 = 1  # the number for BT.709 in all three of primaries, transfer and matrix (ITU-T H.273)
# Pixels from which x264 looks 20 frames ahead, as x265 does, and not 40: at 4K each of them takes 25 MB of main memory.
_LARGE = 4_000_000
_LIMITED = 1  # AVCOL_RANGE_MPEG


def check_video_path(path: str | os.PathLike[str]) -> str:
    """Tell what `path` asks for: "video" (.mp4, .mkv, .mov) or "frames" (no suffix, or a trailing slash: PNG folder).

    Looks at the name only. Raises T3Error for any other suffix.
    """
    text = os.fspath(path)
    name, suffix = Path(text).name.lower(), Path(text).suffix.lower()
    if text.endswith(("/", os.sep)) or not (suffix or name in _FORMATS):
        return "frames"
    if suffix in _FORMATS:
        return "video"
    raise T3Error(
        f"{text!r} cannot be written: a video's name ends in {', '.join(_FORMATS)}. Use one of these, "
        "or end the path in '/' for a folder of PNG frames."
    )


def check_video(
    path: str | os.PathLike[str],
    *,
    width: int,
    height: int,
    fps: float | Fraction,
    codec: str | None = None,
    bit_depth: int = 8,
    crf: float | None = None,
    overwrite: bool = False,
    need_bytes: int | None = None,
) -> Path:
    """Check everything that can be checked before the first frame exists, and return the absolute path.

    The arguments are those of the writers; `need_bytes` is the disk space the output is expected to take.
    Raises T3Error for an illegal name, size, rate, codec, bit depth or crf, or an output that cannot be written.
    """
    if check_video_path(path) == "frames":
        if codec is not None or crf is not None:
            raise T3Error(
                f"A PNG folder ({os.fspath(path)!r}) takes no codec and no crf: PNG is lossless. Leave them out, "
                "or name a .mp4, .mkv or .mov file."
            )
        _check_choice("bit depth of PNG frames", bit_depth, (8, 16))
        _check_size(width, height, 1, 1)
        frame_rate(fps)
        return check_output_folder(path, overwrite, need_bytes, _PNG_FILES)
    codec = "h264" if codec is None else codec
    _check_choice("video codec", codec, tuple(_ENCODERS))
    _check_choice(f"bit depth of {codec}", bit_depth, (8, 10))
    _check_size(width, height, _SMALLEST[codec], 2)
    frame_rate(fps)
    if crf is not None and not 0 <= crf <= 51:
        raise T3Error(f"crf {crf} is outside 0 (best) to 51 (smallest file). The usual one is {_CRF[codec]}.")
    return check_output(path, overwrite, need_bytes)


def frame_rate(fps: float | Fraction) -> Fraction:
    """Frames per second as an exact fraction; 29.97002997 becomes 30000/1001. Raises T3Error outside 0.01 to 1000."""
    try:
        rate = Fraction(fps).limit_denominator(1001)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise T3Error(f"{fps!r} is no frame rate. Give frames per second, such as 24 or 29.97.") from error
    if not Fraction(1, 100) <= rate <= 1000:
        raise T3Error(f"A frame rate of {fps} is outside 0.01 to 1000 frames per second. Wan's are 16 and 24.")
    return rate


def crop_rows(height: int, target: int = 2160) -> tuple[int, int]:
    """Rows to remove at the (top, bottom): (8, 8) for 2176 to 2160. Raises T3Error if there are too few."""
    if not 0 < target <= height:
        raise T3Error(f"Frames of {height} rows cannot be cropped to {target}. Use 1 to {height} rows.")
    top = (height - target) // 2
    return top, height - target - top


def crop_frames(frames, height: int):
    """Centre crop of `[..., H, W, 3]` (numpy or torch) to `height` rows: a view, nothing is copied."""
    top, _ = crop_rows(frames.shape[-3], height)
    return frames[..., top : top + height, :, :]


def open_writer(path: str | os.PathLike[str], **options: Any) -> VideoWriter | PngWriter:
    """The writer for `path`: `VideoWriter` for .mp4, .mkv and .mov, else `PngWriter`; `options` are theirs."""
    return (VideoWriter if check_video_path(path) == "video" else PngWriter)(path, **options)


class _Writer:
    """What both writers share: the arguments, the session behind `with`, and frames of any kind turned into one.

    Args:
        path: the final file or folder. It appears when the `with` block ends without an error.
        width, height: of the frames; even for video.
        fps: frames per second; a PNG folder keeps it in `metadata.json`.
        codec: "h264" (the default) or "h265"; nothing for PNG.
        bit_depth: 8 or 10 for video (10-bit H.264 plays in few browsers, 10-bit H.265 in most); 8 or 16 for PNG.
        crf: 0 (best) to 51, by default 17 for h264 and 19 for h265; nothing for PNG.
        overwrite: whether to replace an existing file, or a folder that holds nothing but earlier frames.
        metadata: entries for the file, or for `metadata.json`; values that are not strings are stored as JSON.

    Raises:
        T3Error: as `check_video`, at once; as `write`; or, on leaving the block, if no frame was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        width: int,
        height: int,
        fps: float | Fraction,
        codec: str | None = None,
        bit_depth: int = 8,
        crf: float | None = None,
        overwrite: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        settings: dict[str, Any] = {"fps": fps, "codec": codec, "bit_depth": bit_depth, "crf": crf}
        self.path = check_video(self._named(path), width=width, height=height, overwrite=overwrite, **settings)
        self.width, self.height, self.bit_depth = width, height, bit_depth
        self.rate = frame_rate(fps)
        self.codec = "h264" if codec is None else codec
        self.crf = _CRF[self.codec] if crf is None else crf
        self.overwrite = overwrite
        self.metadata = {
            str(key): utf8_text(value) if isinstance(value, str) else json_text(value)
            for key, value in (metadata or {}).items()
        }
        self.frames_written = 0  # how many frames were handed over so far
        self._failed = False  # a caller may go on after an error; a clip with a hole is not published

    def __enter__(self):
        self._session = self._whole()
        self._session.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> bool | None:
        return self._session.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        with self._open():
            yield
            if self._failed or not self.frames_written:
                why = f"it failed after {self.frames_written} frames" if self._failed else "no frame arrived"
                raise T3Error(f"{self.path} was not written: {why}. Write again, from the first frame on.")

    def write(self, frames: numpy.ndarray | torch.Tensor) -> None:
        """Append frames `[n, H, W, 3]`: uint8, uint16 (0 to 65535) or any float in [0, 1] (clipped), on any device.

        Raises:
            T3Error: another shape or dtype, NaN or infinity in a frame (its number in the clip is named), or the
                file could not be written. No output appears after that.
        """
        import torch

        from .picture_planes import in_unit_range

        shape, want = tuple(frames.shape), (self.height, self.width, 3)
        if len(shape) != 4 or shape[1:] != want:
            raise T3Error(f"Frames of shape {list(shape)} do not fit: this output takes [n, {want[0]}, {want[1]}, 3].")
        for frame in frames:
            if not isinstance(frame, torch.Tensor):
                # A copy, because torch takes neither negative strides nor (without a warning) read-only memory.
                frame = torch.from_numpy(frame.copy())
            self._failed = True
            with self._errors():
                self._write(in_unit_range(frame, self.frames_written))
            self._failed = False
            self.frames_written += 1

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say where a disk or encoder error happened. av's errors derive from OSError, ValueError or neither."""
        import av

        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            raise T3Error(
                f"Writing {self.path} failed after {self.frames_written} frames: {reason(error)}. Nothing was put "
                "there. Check the free space of that disk, or write to another one."
            ) from error

    def _named(self, path: str | os.PathLike[str]) -> str:
        """The path, refused if it is not for this writer."""
        raise NotImplementedError

    def _open(self) -> contextlib.AbstractContextManager[None]:
        """The life of the output: open, frames, finish; nothing left behind on an exception."""
        raise NotImplementedError

    def _write(self, frame: torch.Tensor) -> None:
        """Append one frame, float32 in [0, 1]."""
        raise NotImplementedError


class VideoWriter(_Writer):
    """H.264 or H.265 in .mp4, .mkv or .mov: 4:2:0, BT.709, limited range, converted and tagged as such.

    The arguments are described at the shared base; `with VideoWriter("clip.mp4", width=..., ...) as out:`.
    audio: goes beside the picture, as AAC, and ends with it at the latest.
    """

    def __init__(self, path: str | os.PathLike[str], *, audio: Audio | None = None, **options: Any) -> None:
        self._audio = None if audio is None else audio.checked()
        super().__init__(path, **options)

    def _named(self, path: str | os.PathLike[str]) -> str:
        if check_video_path(path) != "video":
            raise T3Error(f"{os.fspath(path)!r} names a folder. A video's name ends in {', '.join(_FORMATS)}.")
        return os.fspath(path)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        import av

        with atomic_path(self.path, self.overwrite) as temp:
            suffix = self.path.suffix.lower()
            flags = [] if suffix == ".mkv" else ["faststart"]  # the index first, so that players start at once
            if flags and self.metadata:
                flags.append("use_metadata_tags")  # without it only a few known names survive
            options = {"movflags": "+".join(flags)} if flags else {}
            with self._errors():
                container = av.open(str(temp), "w", format=_FORMATS[suffix], options=options)
            try:
                with self._errors():
                    container.metadata.update(self.metadata)
                    self._stream = self._add_stream(container)
                    self._sound = None if self._audio is None else AudioTrack(container, self._audio)
                self._container = container
                yield
                with self._errors():
                    container.mux(self._stream.encode(None))
                    if self._sound is not None:
                        self._sound.finish()
                    container.close()
            except BaseException:
                # Closed before the file goes: Windows does not remove open files.
                with contextlib.suppress(Exception):
                    container.close()
                raise

    def _add_stream(self, container):
        options = {"crf": f"{self.crf:g}"}
        if self.codec == "h265":
            options["x265-params"] = "log-level=error"
        elif self.width * self.height > _LARGE:
            options["rc-lookahead"] = "20"
        encoder = _ENCODERS[self.codec]
        try:
            stream = container.add_stream(encoder, rate=self.rate, options=options)
        except ValueError as error:
            raise T3Error(
                f"This PyAV has no {encoder}. Use the other codec, or PyPI's build: pip install av"
            ) from error
        stream.width, stream.height = self.width, self.height
        stream.pix_fmt = "yuv420p" if self.bit_depth == 8 else "yuv420p10le"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        if self.codec == "h265" and self.path.suffix.lower() != ".mkv":
            context.codec_tag = "hvc1"  # QuickTime does not play the muxer's own choice, hev1
        return stream

    def _write(self, frame: torch.Tensor) -> None:
        import av

        from .picture_planes import fill_plane, yuv420

        picture = av.VideoFrame(self.width, self.height, self._stream.pix_fmt)
        for plane, values in zip(picture.planes, yuv420(frame, self.bit_depth), strict=True):
            fill_plane(plane, values.astype("u1" if self.bit_depth == 8 else "<u2"))
        picture.colorspace, picture.color_range = _BT709, _LIMITED
        picture.pts, picture.time_base = self.frames_written, 1 / self.rate
        self._container.mux(self._stream.encode(picture))
        if self._sound is not None:
            self._sound.advance((self.frames_written + 1) / self.rate)


class PngWriter(_Writer):
    """A folder of `frame_00000.png`, `frame_00001.png`, ... and a `metadata.json`; 8 or 16 bits per channel.

    Used as `VideoWriter` is. The name is taken for a folder even if it looks like a file's.
    """

    def _named(self, path: str | os.PathLike[str]) -> str:
        return f"{os.fspath(path)}/"

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        import av

        with atomic_folder(self.path, self.overwrite, _PNG_FILES) as temp:
            self._folder, self._files = temp, 0
            self._encoder = av.CodecContext.create("png", "w")
            self._encoder.width, self._encoder.height = self.width, self.height
            self._encoder.pix_fmt = "rgb24" if self.bit_depth == 8 else "rgb48be"
            self._encoder.time_base = Fraction(1, 25)  # required, and unused in an image
            yield
            with self._errors():
                self._save(self._encoder.encode(None))
                about = {"frames": self.frames_written, "fps": str(self.rate)} | self.metadata
                (temp / "metadata.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")

    def _write(self, frame: torch.Tensor) -> None:
        import av

        from .picture_planes import fill_plane

        picture = av.VideoFrame(self.width, self.height, "rgb24" if self.bit_depth == 8 else "rgb48be")
        levels = frame.mul_(2**self.bit_depth - 1).round_().cpu().numpy()
        fill_plane(picture.planes[0], levels.astype("u1" if self.bit_depth == 8 else ">u2"))
        picture.pts = self.frames_written
        self._save(self._encoder.encode(picture))

    def _save(self, packets) -> None:
        # The encoder may work on several frames at once: a packet is the next file, not the frame just handed in.
        for packet in packets:
            (self._folder / f"frame_{self._files:05}.png").write_bytes(bytes(packet))
            self._files += 1


def _check_choice(what: str, value, legal: tuple) -> None:
    if value not in legal:
        raise T3Error(f"{value!r} is no {what}. Use {' or '.join(str(choice) for choice in legal)}.")


def _check_size(width: int, height: int, smallest: int, multiple: int) -> None:
    if min(width, height) < smallest or max(width, height) > 16384:
        raise T3Error(f"{width} x {height} cannot be written. Width and height are {smallest} to 16384 pixels here.")
    if width % multiple or height % multiple:
        nearest = " x ".join(str(side // multiple * multiple) for side in (width, height))
        way_out = f"Crop the frames to {nearest}, or write PNG frames (a path that ends in '/')."
        raise T3Error(f"{width} x {height} is odd, and 4:2:0 video needs even sizes. {way_out}")
