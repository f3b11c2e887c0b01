"""What was measured of the backends: a table shipped with the code, and one that this machine has made itself."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..cache import cache_folder
from ..errors import T3Error
from ..files import atomic_path
from .registry import BACKENDS, Situation

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).with_name("measured.json")
NO_TIME = "no time was left"
# Cards multiply both at the same rate, so times in one hold for the other.
HALF = {"float16", "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """Times of backends for equal work: `windows` windows of `window` tokens, all `heads` heads, forward only.

    ms: milliseconds by backend; failed: why others gave none. versions: of torch, cuDNN and the packages, as far as
    they were recorded. date: ISO; source: who measured, and what came before.
    """

    card: str
    capability: tuple[int, int]
    dtype: str
    head_dim: int
    window: int
    windows: int
    heads: int
    ms: dict[str, float]
    failed: dict[str, str]
    versions: dict[str, str]
    date: str
    source: str

    @classmethod
    def from_json(cls, data: dict) -> Entry:
        """Raises `ValueError`, `TypeError` or `KeyError` for anything that is no entry."""
        entry = cls(**{**data, "capability": tuple(data["capability"])})
        numbers = (entry.head_dim, entry.window, entry.windows, entry.heads, *entry.ms.values())
        if not all(isinstance(n, (int, float)) and n > 0 and math.isfinite(n) for n in numbers):
            raise ValueError(f"an entry has a number that cannot be: {numbers}")
        texts = (entry.card, entry.dtype, entry.date, entry.source, *entry.failed.values(), *entry.versions.values())
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("an entry has a text that is none")
        return entry

    def to_be_tried(self, backends: Iterable[str]) -> list[str]:
        """Those that gave no time for want of it, or of memory, which says nothing of the next try."""
        if self.versions != versions():
            return []
        passing = [name for name, why in self.failed.items() if why == NO_TIME or why.startswith("OutOfMemoryError")]
        return [name for name in backends if name in passing]

    def joined(self, later: Entry) -> Entry:
        """This entry with what was found later of the same window."""
        failed = {name: why for name, why in self.failed.items() if name not in later.ms} | later.failed
        return replace(later, ms={**self.ms, **later.ms}, failed=failed)

    @property
    def place(self) -> tuple:
        """What a newer entry must share to replace this one."""
        versions = tuple(sorted(self.versions.items()))
        return self.card, self.capability, self.dtype, self.head_dim, self.window, versions

    def per_token(self, backend: str, window: int) -> float:
        """Milliseconds for one token of a window of `window` tokens, from those of a window about as long."""
        return self.ms[backend] / (self.windows * self.window) * (window / self.window)


def bucket(window: int) -> int:
    """The power of two that a window's length is nearest to: times are taken to hold throughout."""
    return round(math.log2(window))


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What the times depend on beside the card."""
    found = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    for name in {b.distribution for b in BACKENDS.values() if b.distribution}:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cache_file() -> Path:
    """Where this machine keeps its own times."""
    return cache_folder() / "attention_times.json"


def read(path: Path) -> list[Entry]:
    """The entries of a file; none, and one sentence, where it cannot be read. A missing file is empty."""
    try:
        return [Entry.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _tell(f"T3: {path} is no table of attention times ({type(error).__name__}); it is ignored.")
        return []


def save(entries: Iterable[Entry], path: Path) -> None:
    """Add entries to a file, each in place of an older one like it. Raises `OSError` or `T3Error` if it cannot."""
    kept = {entry.place: entry for entry in (*read(path), *entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, overwrite=True) as draft:
        draft.write_text(json.dumps([asdict(entry) for entry in kept.values()], indent=1) + "\n", encoding="utf-8")


def remember(entry: Entry) -> None:
    """Save to this machine's own table; where that cannot be, say so once."""
    try:
        save([entry], cache_file())
    except (OSError, T3Error) as error:
        _tell(f"T3: times of attention backends are not kept ({error}); they are measured again in each process.")


@lru_cache(maxsize=16)
def _tell(sentence: str) -> None:
    log.warning("%s", sentence)


def find(s: Situation, window: int) -> Entry | None:
    """Times on this kind of card for such a window: this machine's own, of today's versions, else the shipped ones.

    Of several those of the most backends, then those in this dtype, then those of the nearest length.
    """

    def order(entry: Entry) -> tuple:
        return -len(entry.ms), entry.dtype != _name(s.dtype), abs(math.log(entry.window / window))

    own = [entry for entry in read(cache_file()) if entry.versions == versions()]
    for entries in (own, read(SHIPPED)):
        like = [entry for entry in entries if _serves(entry, s, window)]
        if like:
            return min(like, key=order)
    return None


def _serves(entry: Entry, s: Situation, window: int) -> bool:
    return (
        entry.card == s.card
        and entry.capability == s.capability
        and (entry.dtype == _name(s.dtype) or {entry.dtype, _name(s.dtype)} == HALF)
        and entry.head_dim == s.head_dim
        and bucket(entry.window) == bucket(window)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
