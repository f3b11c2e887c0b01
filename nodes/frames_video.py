"""A VIDEO made of decoded frames that stay in 8 or 16 bits: nothing builds a float tensor unless IMAGE is asked for."""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import Input, Types

from ..t3.audio import Audio
from ..t3.errors import T3Error
from ..t3.vae.output import WHOLE_NUMBERS
from ..t3.video import VideoWriter
from .frame_buffer import new_images

# Times come as floats: a frame that begins within a millionth of a frame of the asked time is meant.
_NEARLY = 1e-6


class FramesVideo(Input.Video):
    """ComfyUI's VIDEO over a buffer of frames.

    Args:
        frames: `[frames, H, W, 3]`, uint8 (an 8-bit video) or uint16 (10 bits), H and W even; not to be changed later.
        rate: frames per second.
        audio: ComfyUI's AUDIO; the first of its batch goes into the file, and what is longer than the frames does not.

    Raises T3Error for audio that no video holds.
    """

    def __init__(self, frames: torch.Tensor, rate: Fraction, audio: Mapping[str, Any] | None = None) -> None:
        self._frames, self._rate, self._audio = frames, rate, audio
        self._sound = None if audio is None else Audio(audio["waveform"][0], int(audio["sample_rate"])).checked()
        self._file: bytes | None = None

    def get_dimensions(self) -> tuple[int, int]:
        """Width and height."""
        return self._frames.shape[2], self._frames.shape[1]

    def get_frame_count(self) -> int:
        return self._frames.shape[0]

    def get_frame_rate(self) -> Fraction:
        return self._rate

    def get_duration(self) -> float:
        """Seconds."""
        return float(self._frames.shape[0] / self._rate)

    def get_bit_depth(self) -> int:
        """8 or 10: what a file gets if nobody says otherwise."""
        return 8 if self._frames.dtype == torch.uint8 else 10

    def get_container_format(self) -> str:
        """What av calls the format of the file of `get_stream_source`."""
        return "mov,mp4,m4a,3gp,3g2,mj2"

    def get_active_trim_window(self) -> tuple[float, float]:
        """Nothing to trim: a trimmed video of this kind holds its own frames only."""
        return 0.0, 0.0

    def get_components(self) -> Types.VideoComponents:
        """All frames as float32 `[frames, H, W, 3]` in [0, 1], audio and rate. Raises T3Error if they do not fit."""
        way_out = "Save the video as it is, or trim it before taking it apart."
        images = new_images(self._frames.shape, torch.float32, torch.device("cpu"), way_out)
        for image, frame in zip(images, self._frames, strict=True):
            image.copy_(frame).div_(WHOLE_NUMBERS[frame.dtype])
        return Types.VideoComponents(images=images, audio=self._audio, frame_rate=self._rate)

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = False
    ) -> FramesVideo | None:
        """The frames that begin in `duration` seconds (0: all) from `start_time` (negative: from the end), and the
        audio under them. The buffer is shared, nothing is copied.

        None if no frame is left, or if `strict_duration` and there is less than `duration`.
        """
        total = self.get_frame_count()
        start = start_time or 0.0
        if start < 0:
            start = max(self.get_duration() + start, 0.0)
        first, stop = self._frame_at(start), total
        if duration:
            stop = min(total, self._frame_at(start + duration))
            if strict_duration and duration > self.get_duration() - start + _NEARLY:
                return None
        if first >= stop:
            return None
        return FramesVideo(self._frames[first:stop], self._rate, self._audio_between(first, stop))

    def _frame_at(self, seconds: float) -> int:
        """The first frame that does not begin before this time."""
        return math.ceil(seconds * self._rate - _NEARLY)

    def _audio_between(self, first: int, stop: int) -> dict[str, Any] | None:
        if self._audio is None:
            return None
        begin, end = (round(frame * int(self._audio["sample_rate"]) / self._rate) for frame in (first, stop))
        waveform = self._audio["waveform"][..., begin:end]
        return {**self._audio, "waveform": waveform} if waveform.shape[-1] else None

    def get_stream_source(self) -> io.BytesIO:
        """An MP4 in memory, encoded at the first call: some hundredths of what the frames take, and no file whose
        life ends with this object's."""
        if self._file is None:
            buffer = io.BytesIO()
            self.save_to(buffer)
            self._file = buffer.getvalue()
        return io.BytesIO(self._file)

    def save_to(
        self,
        path: str | IO[bytes],
        format: Types.VideoContainer = Types.VideoContainer.AUTO,
        codec: Types.VideoCodec = Types.VideoCodec.AUTO,
        metadata: dict | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
    ) -> None:
        """Encode to H.264 frame by frame; under `path` there is a whole file at the end, or what was there before.

        Args:
            path: a file name, or something to write bytes to.
            format, codec: MP4 and H.264 are the only ones, as in ComfyUI's own videos.
            metadata: entries for the file; SaveVideo gives the graph here.
            bit_depth: 8 or 10; that of the frames if None.
            crf: 0 (best) to 51 (smallest file); 17, hardly to be told from the frames, if None.

        Raises:
            T3Error: another format or codec, values out of range, or a file that cannot be written.
        """
        if format not in ("auto", "mp4") or codec not in ("auto", "h264"):
            asked = " ".join(getattr(name, "value", str(name)) for name in (format, codec))
            raise T3Error(f"this video cannot be saved as {asked}. Choose mp4 (or auto) and h264 (or auto).")
        options = {"bit_depth": self.get_bit_depth() if bit_depth is None else bit_depth, "crf": crf}
        if isinstance(path, (str, os.PathLike)):
            self._encode(path, metadata, options)
            return
        folder = folder_paths.get_temp_directory()
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            whole = Path(place) / "video.mp4"
            self._encode(whole, metadata, options)
            with open(whole, "rb") as file:
                shutil.copyfileobj(file, path)

    def _encode(self, path: str | os.PathLike[str], metadata: dict | None, options: dict[str, Any]) -> None:
        width, height = self.get_dimensions()
        options |= {"width": width, "height": height, "fps": self._rate, "metadata": metadata, "audio": self._sound}
        bar = comfy.utils.ProgressBar(self.get_frame_count())
        with VideoWriter(path, codec="h264", overwrite=True, **options) as writer:
            for number, frame in enumerate(self._frames, 1):
                comfy.model_management.throw_exception_if_processing_interrupted()
                writer.write(frame[None])
                bar.update_absolute(number)
