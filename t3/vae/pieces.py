"""Decoded pieces on their way to rank 0: frame after frame of each tile, so that nobody holds more than a few of them.

Before each piece goes a header of whole numbers: what comes, where it belongs, and how much work its rank has done.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

import torch

from ..errors import T3Error
from .attempt import Meter, Say
from .output import Outlet
from .ranks import RankLost, Ranks
from .tiles import Window

PIECE, SAID, FAILED, DONE = range(4)
# kind, work done; then of a piece: frame, first row, first column, rows, columns; of a text: bytes
_HEADER = 7
# Seconds between two looks at whether the others have finished.
_LOOK = 0.02


class Sender:
    """What another rank than 0 sends: pieces, texts, the end."""

    def __init__(self, ranks: Ranks, meter: Meter, heard: deque[str]) -> None:
        """heard: texts for rank 0, sent along with the next piece."""
        self.ranks, self.meter, self.heard = ranks, meter, heard

    def piece(self, frame: int, place: Window, pixels: torch.Tensor) -> None:
        """`pixels`, `[h, w, 3]`, are `place` of frame number `frame`."""
        self._texts()
        rows, cols = place.rows, place.cols
        self._header(PIECE, frame, rows.start, cols.start, rows.length, cols.length)
        self.ranks.send(pixels)

    def done(self) -> None:
        """All that this rank was to do is sent."""
        self._texts()
        self._header(DONE)

    def failed(self, text: str) -> None:
        """Why this rank sends no more."""
        self._text(FAILED, text)

    def _texts(self) -> None:
        while self.heard:
            self._text(SAID, self.heard.popleft())

    def _text(self, kind: int, text: str) -> None:
        data = text.encode() or b"?"
        self._header(kind, len(data))
        self.ranks.send(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _header(self, kind: int, *numbers: int) -> None:
        header = [kind, self.meter.done, *numbers]
        self.ranks.send(torch.tensor(header + [0] * (_HEADER - len(header))))


class SendingOutlet(Outlet):
    """An outlet whose target is rank 0's."""

    def __init__(self, sender: Sender, place: Window, frames: int, dtype: torch.dtype, device: torch.device) -> None:
        """place: of the picture, in pixels. frames: of the clip."""
        # Only its shape is looked at: one number that stands for all.
        like = torch.empty(1, dtype=dtype).expand(frames, place.rows.length, place.cols.length, 3)
        super().__init__(like, device)
        self._sender, self._place = sender, place

    def _write(self, number: int, pixels: torch.Tensor) -> None:
        self._sender.piece(number, self._place, pixels.contiguous())


class Inbox:
    """Rank 0's part: a thread for each other rank puts its pieces into `out`, `[frames, H, W, 3]`."""

    def __init__(self, ranks: Ranks, out: torch.Tensor, say: Say) -> None:
        self._ranks, self._out, self._say = ranks, out, say
        self._work = [0] * ranks.size
        self._texts: deque[str] = deque()
        self._faults: deque[Exception] = deque()
        self._threads = [
            threading.Thread(target=self._take, args=(rank,), name=f"pieces of rank {rank}", daemon=True)
            for rank in range(1, ranks.size)
        ]

    def open(self) -> None:
        """From here on pieces are taken."""
        for thread in self._threads:
            thread.start()

    @property
    def work(self) -> int:
        """Done by the others, by what they said last."""
        return sum(self._work)

    def look(self) -> None:
        """Pass on what the others said. Raises the fault that ended one of them."""
        while self._texts:
            self._say(self._texts.popleft())
        if self._faults:
            raise self._faults[0]

    def close(self) -> None:
        """Until nothing more comes from anybody, whatever becomes of it: the next clip's pieces are not these."""
        for thread in self._threads:
            thread.join()

    def wait(self, meter: Meter) -> None:
        """Until all others have sent everything, with progress."""
        while any(thread.is_alive() for thread in self._threads):
            self.look()
            meter.add(0)
            time.sleep(_LOOK)
        self.look()
        meter.add(0)

    def _take(self, rank: int) -> None:
        try:
            self._take_all(rank)
        except Exception as error:
            self._faults.append(error)

    def _take_all(self, rank: int) -> None:
        header, size = torch.empty(_HEADER, dtype=torch.int64), self._out.element_size()
        room = torch.empty(0, dtype=torch.uint8)
        while True:
            kind, self._work[rank], *numbers = self._ranks.receive(header, rank).tolist()
            if kind == DONE:
                return
            if kind == PIECE:
                frame, top, left, rows, cols = numbers
                need = rows * cols * 3 * size
                if len(room) < need:
                    room = torch.empty(need, dtype=torch.uint8)
                pixels = self._ranks.receive(room[:need], rank).view(self._out.dtype).view(rows, cols, 3)
                self._out[frame, top : top + rows, left : left + cols].copy_(pixels)
                continue
            text = self._ranks.receive(torch.empty(numbers[0], dtype=torch.uint8), rank).numpy().tobytes().decode()
            if kind == FAILED:
                raise T3Error(text)
            self._texts.append(f"rank {rank}: {text}")


def tell_failure(sender: Sender, error: Exception) -> None:
    """Let rank 0 know what ended this rank, if it is still there."""
    with contextlib.suppress(RankLost):
        sender.failed(str(error))
