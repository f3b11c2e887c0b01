"""Sound for a video file: AAC, encoded beside the frames. Nothing here loads av or torch before a file is written."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import T3Error

if TYPE_CHECKING:
    import torch

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
# What AAC has; anything else is resampled to the usual one.
_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_USUAL_RATE = 48000


class Audio(NamedTuple):
    """waveform: `[channels, samples]`, any float dtype, about in [-1, 1]. sample_rate: samples per second."""

    waveform: torch.Tensor
    sample_rate: int

    def checked(self) -> Audio:
        """This. Raises T3Error for what no file can hold: channels other than 1, 2 or 6, no samples, NaN, no rate."""
        import torch

        shape = list(self.waveform.shape)
        if len(shape) != 2 or not all(shape):
            raise T3Error(f"The audio has the shape {shape}. Give [channels, samples], or leave the audio out.")
        if shape[0] not in _LAYOUTS:
            raise T3Error(f"The audio has {shape[0]} channels. A video takes 1, 2 or 6; mix it down to 2 first.")
        if not self.sample_rate > 0:
            raise T3Error(f"The audio has {self.sample_rate} samples per second. Load or make it again.")
        bad = int((~torch.isfinite(self.waveform)).sum())
        if bad:
            raise T3Error(f"{bad} samples of the audio are NaN or infinite. Make it again, or leave the audio out.")
        return self


class AudioTrack:
    """The audio stream of an open PyAV container. It is fed as far as the picture has come, so that both interleave."""

    def __init__(self, container: Any, audio: Audio) -> None:
        self._container, self._audio = container, audio
        rate = audio.sample_rate if audio.sample_rate in _RATES else _USUAL_RATE
        self._layout = _LAYOUTS[audio.waveform.shape[0]]
        self._stream = container.add_stream("aac", rate=rate, layout=self._layout)
        self._done = 0

    def advance(self, seconds: Fraction) -> None:
        """Encode up to `seconds` from the start, as far as the audio goes."""
        import av
        import torch

        waveform, rate = self._audio
        until = min(-(-seconds.numerator * rate // seconds.denominator), waveform.shape[1])
        if until <= self._done:
            return
        piece = waveform[:, self._done : until].detach().to("cpu", torch.float32).contiguous()
        frame = av.AudioFrame.from_ndarray(piece.numpy(), format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, self._done, Fraction(1, rate)
        self._container.mux(self._stream.encode(frame))
        self._done = until

    def finish(self) -> None:
        """Encode what the encoder still holds."""
        self._container.mux(self._stream.encode(None))
