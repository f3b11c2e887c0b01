"""The most of something while work is done, watched from a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Most:
    """The largest value that `measure()` gave inside a `with` block, looked at every `every` seconds."""

    def __init__(self, measure: Callable[[], int], every: float) -> None:
        self.measure, self.every = measure, every

    def __enter__(self) -> Most:
        self.before = self.most = self.measure()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    @property
    def taken(self) -> int:
        """Beyond what it was at the start."""
        return self.most - self.before

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            self.most = max(self.most, self.measure())
