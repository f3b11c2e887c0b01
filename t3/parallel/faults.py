"""How the processes of one command end: all together, within seconds, with the reason on the screen.

A rank that fails leaves its reason in the store and goes. A rank that is killed leaves nothing: each rank looks after
the processes of its own machine, and after a sign of life of those on others. Ranks that wait for a lost one, in a
collective that will never end, are interrupted; where that is not heard, the process is ended.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import cli
from ..errors import T3Error

if TYPE_CHECKING:
    from .world import World

FAILED = 1
LOOK = 0.25  # seconds between two looks
# A process that holds Python's lock for long, as while it loads a library, gives no sign of life for that time.
SILENT_SECONDS = 60.0
# For what is under way: temporary files are removed, a collective is given up.
GRACE_SECONDS = 4.0
_ALL_END = "All ranks end with it; clips that are finished stay."


class Watch:
    """Looks after the other ranks in a thread of its own. `cause()` is why this rank is to end, if it is."""

    def __init__(self, world: World, store: Any, everyone: list[dict[str, Any]]) -> None:
        """store: a connection of its own to what all ranks share; everyone: what each said of itself."""
        self.rank, self.size, self.name = world.rank, world.size, world.name
        self._store = store
        me = everyone[world.rank]
        self._near = {
            rank: other["pid"]
            for rank, other in enumerate(everyone)
            if rank != world.rank
            and (other["host"], other["parent"]) == (me["host"], me["parent"])
            # Not the same machine after all, if its process cannot be seen from here.
            and _alive(other["pid"])
        }
        self._far = [rank for rank in range(world.size) if rank != world.rank and rank not in self._near]
        self._hosts = [other["host"] for other in everyone]
        self._heard = {rank: (0, time.monotonic()) for rank in self._far}
        self._parent = os.getppid()
        self._lock = threading.Lock()
        self._cause: dict[str, Any] | None = None
        self._stop, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._signals: socket.socket | None = None

    def start(self) -> None:
        """Begin to look. From the main thread: signals are listened to as well, even while it waits in a library."""
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGTERM"):
            self._signals, writer = socket.socketpair()
            self._signals.setblocking(False)
            writer.setblocking(False)
            self._writer = writer
            signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Look no more: all ranks are done."""
        self._stop.set()
        self._thread.join(timeout=2)
        if self._signals is not None:
            signal.set_wakeup_fd(-1)

    def fail(self, text: str, status: int) -> None:
        """Leave the reason why this rank ends, for the others and for rank 0's result."""
        with contextlib.suppress(Exception):
            self._store.set("failed", json.dumps({"rank": self.rank, "text": text, "status": status, "said": True}))

    def cause(self, wait: float = 0.0) -> dict[str, Any] | None:
        """Which other rank's end this one ends for: `rank`, `text` and `status`; None if there is none within `wait`
        seconds."""
        end = time.monotonic() + wait
        while True:
            found = self._look()
            if found is not None or time.monotonic() > end:
                return found
            time.sleep(LOOK / 5)

    def last_words(self) -> None:
        """Let the others read why this rank ends, where its process holds what they share."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        with contextlib.suppress(Exception):
            heard = self._store.add("heard", 1)
            end = time.monotonic() + GRACE_SECONDS / 2
            while self.rank == 0 and heard < self.size and time.monotonic() < end:
                time.sleep(LOOK / 5)
                heard = self._store.add("heard", 0)

    def leaving(self) -> None:
        """The main thread has heard and cleans up: it may still take `GRACE_SECONDS`."""
        self._leaving.set()

    def speaks(self) -> bool:
        """Whether this rank is the one to say what another's end was."""
        with contextlib.suppress(Exception):
            return self._store.add("spoken", 1) == 1
        return True  # better twice than never

    def fails_first(self) -> bool:
        """Whether no other rank has come to this point: of ranks that fail alike, one says so."""
        with contextlib.suppress(Exception):
            return self._store.add("failing", 1) == 1
        return True

    def _look(self) -> dict[str, Any] | None:
        with self._lock:
            if self._cause is None:
                try:
                    self._cause = self._find()
                except Exception as error:
                    self._cause = self._lost_store(error)
            return self._cause

    def _find(self) -> dict[str, Any] | None:
        if self._store.check(["failed"]):
            told = json.loads(self._store.get("failed"))
            return told if told["rank"] != self.rank else None
        for rank, pid in self._near.items():
            if not _alive(pid) and not self._store.check([f"done/{rank}"]):
                # It may have told why just before.
                if self._store.check(["failed"]):
                    return json.loads(self._store.get("failed"))
                return self._gone(rank)
        if self._far:
            self._store.add(f"alive/{self.rank}", 1)
        for rank in self._far:
            count, since = self._heard[rank]
            # Adding nothing reads a counter, whether it is there or not.
            now = self._store.add(f"alive/{rank}", 0)
            if now != count:
                self._heard[rank] = now, time.monotonic()
            elif time.monotonic() - since > SILENT_SECONDS and not self._store.check([f"done/{rank}"]):
                silent = f"no sign of life from {self._hosts[rank]} for {SILENT_SECONDS:g} seconds"
                return {"rank": rank, "text": f"rank {rank}: {silent}", "status": FAILED}
        if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
            return {"rank": None, "text": "torchrun, which started this process, is gone", "status": FAILED}
        return None

    def _gone(self, rank: int) -> dict[str, Any]:
        why = f"process {self._near[rank]} on {self._hosts[rank]} is gone without a word, as when it is killed or main "
        return {"rank": rank, "text": f"rank {rank}: {why}memory runs out", "status": FAILED}

    def _lost_store(self, error: Exception) -> dict[str, Any]:
        """What the ranks share is gone, with the process that held it."""
        end = time.monotonic() + 1
        while time.monotonic() < end:  # a process loses its connections some time before it is seen to be dead
            for rank, pid in self._near.items():
                if not _alive(pid):
                    return self._gone(rank)
            time.sleep(LOOK / 5)
        why = str(error).strip().splitlines()[0][:200]
        return {"rank": None, "text": f"the process that held what the ranks share is gone ({why})", "status": FAILED}

    def _run(self) -> None:
        signalled: float | None = None
        while not self._stop.wait(LOOK):
            if self._heard_signal():
                signalled = time.monotonic()
            if self._look() is not None:
                break
            if signalled is not None and time.monotonic() - signalled > GRACE_SECONDS:
                break
        if self._stop.is_set():
            return
        if self._cause is not None and not self._leaving.is_set():
            _thread.interrupt_main(signal.SIGTERM)  # whose handler is ours, where SIGINT may be ignored
        if self._leaving.wait(1.0) or self._give_up_collectives():
            self._stop.wait(GRACE_SECONDS)
        if self._stop.is_set():
            return
        # The main thread is deep in a library and does not hear.
        if self._cause is not None:
            cli.say("")  # below a progress bar
            say_cause(self, self._cause)
        leave(self._cause["status"] if self._cause else cli.INTERRUPTED)

    def _heard_signal(self) -> bool:
        if self._signals is None:
            return False
        with contextlib.suppress(BlockingIOError):
            told = self._signals.recv(64)
            return signal.SIGTERM in told or signal.SIGINT in told
        return False

    def _give_up_collectives(self) -> bool:
        """Let go of a main thread that waits for a lost rank's card."""
        import torch.distributed as dist

        def abort() -> None:
            with contextlib.suppress(Exception):
                dist.distributed_c10d._abort_process_group()

        threading.Thread(target=abort, daemon=True).start()
        return True


def run(name: str, command: Callable[[World], int], *, as_json: bool) -> int:
    """As `cli.run`, for a command that may run on several ranks; `command` is given the world and may start it.

    Exit status of each rank: that of the command, or 1 where another rank's failure ended it, or that rank's own
    status. torchrun itself ends with 1 where any of its processes ends with another status than 0.
    """
    from .world import World

    try:
        world = World.from_environment()
    except T3Error as error:
        text = str(error)

        def refuse() -> int:
            raise T3Error(text)

        return cli.run(name, refuse, as_json=as_json)
    if world.size == 1:
        return cli.run(name, lambda: command(world), as_json=as_json)
    world.name = name
    cli.let_words_through()
    # A store that is gone is said in words, not in torch's traces of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not world.is_first:
        os.environ["TQDM_DISABLE"] = "1"  # progress is rank 0's to show
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = command(world)
        world.close()
        return status
    except BaseException as error:
        try:
            return _end(name, world, error, as_json)
        except KeyboardInterrupt:  # the watch's, of the same moment: Python delivers it at the next call, which is this
            return _end(name, world, error, as_json)


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def _end(name: str, world: World, error: BaseException, as_json: bool) -> int:
    """Say what ended this rank, if it is this one's to say, and leave; never waits for another rank."""
    # No second interruption while files are put away: they have been by now.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch = world.watch
    if isinstance(error, SystemExit):
        raise error
    if missing := cli.missing_package(name, error):
        error = T3Error(missing)
    own = str(error) if isinstance(error, T3Error) else _words(error)
    status = cli.BAD_INPUT if isinstance(error, T3Error) else FAILED
    if watch is None:
        # All ranks find the same fault: rank 0 says it, and the others only if it does not within their patience.
        if isinstance(error, KeyboardInterrupt):
            return _say_end(name, cli.UNHARMED, cli.INTERRUPTED, error, as_json) if world.is_first else cli.INTERRUPTED
        if not world.is_first:
            signal.signal(signal.SIGTERM, lambda *_: leave(status))
            time.sleep(GRACE_SECONDS)
        return _say_end(name, own, status, error, as_json and world.is_first)
    watch.leaving()
    # What is raised here may be the echo of another rank's end, which may be noticed a little later.
    cause = watch.cause(0.0 if isinstance(error, T3Error) and world.is_first else 1.5)
    if cause is None and not watch.fails_first():
        cause = watch.cause(1.5)
    if cause is None and isinstance(error, KeyboardInterrupt):
        status = cli.INTERRUPTED
        watch.fail(cli.UNHARMED, status)
        if watch.speaks():
            cli.say(f"{name}: {cli.UNHARMED}")
        if as_json and world.is_first:
            _print_end(cli.UNHARMED, status)
    elif cause is None:
        text = own if isinstance(error, T3Error) else f"rank {world.rank}: {own}. {_ALL_END}"
        watch.fail(text, status)
        _say_end(name, text, status, error, as_json and world.is_first)
    else:
        status = cause["status"]
        say_cause(watch, cause)
        if as_json and world.is_first:
            _print_end(cause["text"], status)
    watch.last_words()
    # Not by way of the interpreter's end, where libraries wait for ranks that are no more.
    leave(status)
    return status


def say_cause(watch: Watch, cause: dict[str, Any]) -> None:
    """One line, on one rank, on why all end. A rank that failed has said it; one that was lost has not."""
    if not cause.get("said") and watch.speaks():
        cli.say(f"{watch.name}: {cause['text']}. {_ALL_END}")


def leave(status: int) -> None:
    """End this process at once."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _print_end(text: str, status: int) -> None:
    cli.print_json({"ok": False, "error": text, "status": status})


def _say_end(name: str, text: str, status: int, error: BaseException, as_json: bool) -> int:
    if not isinstance(error, (T3Error, KeyboardInterrupt)):
        traceback.print_exception(error)
    return cli.report(name, text, status, as_json)


def _words(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where this would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with contextlib.suppress(OSError):
        # Dead, and not yet buried by its parent.
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        return state not in "ZX"
    return True
