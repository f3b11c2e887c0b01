"""Claims on clips: of many processes, on any machines, that work through one list, each clip is made by one.

A claim is a small file beside the output that says who is at work. Its file appears at once with all that is in it, so
of two processes that want a clip one gets it. Whoever holds it touches it twice a minute. It is free for others when
its process is gone, which is seen at once on the same machine; on others when nobody has touched it for
`STALE_SECONDS`. All that is needed is a folder that the processes share.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .cli import say
from .errors import T3Error
from .files import remove_partial

STALE_SECONDS = 600.0
_BEAT_SECONDS = 30.0
# Between two looks at what others hold: more and more, since all who wait look into one folder.
LOOK_SECONDS, MOST_LOOK_SECONDS = 1.0, 15.0
_GONE = "which is gone"
# A clock that is set while a process runs moves the time at which the system says it was born.
_SAME_BIRTH = 5.0
_Job = TypeVar("_Job")


@dataclass(frozen=True)
class Holder:
    """Who has a claim. space: which processes its `pid` counts among; born: of the process, seconds since 1970."""

    host: str
    space: str
    pid: int
    born: float
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Claim:
    """A clip that is this process's. A `with` block keeps it alive, and gives it back at its end."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._stop = threading.Event()

    def __enter__(self) -> Claim:
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.release()

    def release(self) -> None:
        """Let others have it, unless it is another's by now."""
        if holder_at(self.path) == self.holder:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def claim_path(output: Path) -> Path:
    """Where the claim on an output, a file or a folder, is put."""
    return output.with_name(f".{output.name}.claim")


def take(output: Path, *, stale: float = STALE_SECONDS, tell: Callable[[str], object] = say) -> Claim | None:
    """Claim an output; None if another process has it.

    stale: seconds after which a claim of another machine that nobody has touched is free. tell: hears of a claim that
    is taken over. Raises `T3Error` where no file can be put.
    """
    path = claim_path(output)
    me = _myself()
    draft = path.with_name(f".{me.token}.claim")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(me)), encoding="utf-8")
    except OSError as error:
        raise T3Error(f"{path.parent} takes no files ({error.strerror}): choose another --out.") from None
    try:
        if _publish(draft, path):
            return Claim(path, me)
        other = holder_at(path)
        if other is None:
            # Given back just now; or cut short by a full disk, and then it is nobody's after a while.
            with contextlib.suppress(OSError):
                if _age(path, draft) > stale:
                    path.unlink()
            return None
        why = _free(other, path, draft, stale)
        if why is None or not _take_over(draft, path, other, stale):
            return None
        if why == _GONE:
            remove_partial(output, other.pid)
        tell(f"{output.name}: was claimed by {other}, {why}; going on with it here.")
        return Claim(path, me)
    finally:
        draft.unlink(missing_ok=True)


def take_folder(mark: Path, state: str, way: str) -> Claim:
    """Claim a folder by the file that tells what is in it, for one process alone.

    Raises `T3Error` where another has it, or no file can be put: the folder `state` (such as "is in use by") that
    process, `way`.
    """
    claim = take(mark, tell=lambda text: say(f"{mark.parent}: {text}"))
    if claim is None:
        path = claim_path(mark)
        who = holder_at(path) or "another process"
        raise T3Error(f"{mark.parent} {state} {who}, {way} If that process is gone, remove {path}.")
    return claim


def clear(output: Path, *, stale: float = STALE_SECONDS) -> None:
    """Remove the claim on a finished output unless somebody has it: who made it may have died before giving it back.

    Where this process may write nothing the claim stays, and does no harm.
    """
    if not claim_path(output).exists():
        return
    with contextlib.suppress(T3Error):
        claim = take(output, stale=stale, tell=lambda text: None)
        if claim is not None:
            claim.release()


class Shared(Generic[_Job]):
    """Jobs of a list that other processes work through too: iterate over those that are this one's, with their claims.

    It ends when every job is finished or was this one's: where none is left to take it waits for those that others are
    at work on, says so, and takes what they drop. At its end no claim of a dead process is left on what is finished.
    elsewhere: those that are left.
    """

    def __init__(
        self,
        jobs: Iterable[_Job],
        output: Callable[[_Job], Path],
        finished: Callable[[_Job], bool],
        *,
        stale: float = STALE_SECONDS,
        look: float = LOOK_SECONDS,
        tell: Callable[[str], object] = say,
    ) -> None:
        """output: what of a job is claimed. finished: whether all that it makes is on disk. look: seconds between two
        looks at what others hold, at first."""
        self.elsewhere: list[_Job] = list(jobs)
        self._others: list[_Job] = []
        self._output, self._finished, self._stale, self._tell = output, finished, stale, tell
        self._look = look

    def __iter__(self) -> Iterator[tuple[_Job, Claim]]:
        pause, told = self._look, 0
        while self.elsewhere:
            took = False
            for job in list(self.elsewhere):
                if self._is_done(job):
                    continue
                claim = take(self._output(job), stale=self._stale, tell=self._tell)
                if claim is None:
                    continue
                # It may have been finished between the look and the claim.
                if self._is_done(job):
                    claim.release()
                    continue
                self.elsewhere.remove(job)
                took = True
                yield job, claim
            if took:
                pause, told = self._look, 0
            elif self.elsewhere:
                if len(self.elsewhere) != told:
                    told = len(self.elsewhere)
                    self._tell(self._waiting())
                time.sleep(pause)
                pause = min(2 * pause, MOST_LOOK_SECONDS)
        for job in self._others:
            clear(self._output(job), stale=self._stale)

    @property
    def done(self) -> int:
        """How many others finished."""
        return len(self._others)

    def _waiting(self) -> str:
        names = [self._output(job).name for job in self.elsewhere]
        others = "another process" if len(names) == 1 else "other processes"
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return f"waiting    for {', '.join(names[:5])}{more}, in the hands of {others}"

    def _is_done(self, job: _Job) -> bool:
        if not self._finished(job):
            return False
        self.elsewhere.remove(job)
        self._others.append(job)
        return True


def _myself() -> Holder:
    import psutil  # of accelerate, which the engine needs

    return Holder(
        host=platform.node(),
        space=_process_space(),
        pid=os.getpid(),
        born=psutil.Process().create_time(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=secrets.token_hex(8),
    )


def _process_space() -> str:
    """Containers of one machine may have one name and count processes each for itself."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _publish(draft: Path, path: Path) -> bool:
    """Give the finished draft its name, unless that is taken."""
    try:
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        pass
    # No hard links (FAT, some network shares): empty for a moment, in which it counts as another's.
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))
        return True
    except FileExistsError:
        return False


def holder_at(path: Path) -> Holder | None:
    """Who has a claim; None if it was given back, or cannot be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _age(path: Path, draft: Path) -> float:
    """Seconds since a file was touched. draft: written just now, by the clock of the same disk."""
    return draft.stat().st_mtime - path.stat().st_mtime


def _free(other: Holder, path: Path, draft: Path, stale: float) -> str | None:
    """Why another's claim is free, or None if it is not."""
    me = _myself()
    if (other.host, other.space) == (me.host, me.space) and not _alive(other):
        return _GONE
    try:
        age = _age(path, draft)
    except OSError:
        return None
    return f"and nobody has touched that for {age:.0f} seconds" if age > stale else None


def _alive(other: Holder) -> bool:
    import psutil

    try:
        return abs(psutil.Process(other.pid).create_time() - other.born) < _SAME_BIRTH
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _take_over(draft: Path, path: Path, other: Holder, stale: float) -> bool:
    """Put the draft in the place of another's claim; False if somebody else does or has done."""
    marker = path.with_name(f".{other.token}.over")
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError:
        # A process that died right here leaves its marker. Whoever comes next but one goes on.
        with contextlib.suppress(OSError):
            if _age(marker, draft) > stale:
                marker.unlink()
        return False
    try:
        # Only who has the marker replaces this very claim, and the claim is looked at under it.
        if holder_at(path) != other:
            return False
        os.replace(draft, path)
        return True
    finally:
        marker.unlink(missing_ok=True)
