"""Processes, one for each card: started with a log each, and ended when the time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import visible_cards

_GRACE = 5.0  # seconds between asking a process to end and ending it


def run_all(
    commands: Sequence[Sequence[str]],
    logs: Path,
    deadline: float,
    cache: Path,
    each: Callable[[], None] = lambda: None,
) -> list[int]:
    """Run these commands at once, a card for each, and return the exit statuses of those that ended by themselves.

    Their standard error goes to `logs`/worker-N.log. Past `deadline` (`time.time()`) they are asked to end, then
    ended. each: called every few seconds meanwhile. cache: where compiled code is kept for the next process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for number, (command, card) in enumerate(zip(commands, visible_cards(len(commands)), strict=True)):
        environment = {
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(cache.absolute()),
            **os.environ,
            "CUDA_VISIBLE_DEVICES": card,
        }
        with open(logs / f"worker-{number}.log", "ab") as log:
            processes.append(subprocess.Popen([sys.executable, *command], env=environment, stderr=log))
    try:
        while any(process.poll() is None for process in processes) and time.time() < deadline:
            time.sleep(0.5)
            each()
    finally:
        ended = [process.returncode for process in processes if process.poll() is not None]
        _end(processes)
    each()
    return ended


def end_with_parent() -> None:
    """Have this process asked to end once the one that started it is gone, killed for instance: going on beside a new
    run it would take seconds of the card that count as that run's."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _end(processes: list[subprocess.Popen]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    until = time.time() + _GRACE
    for process in running:
        try:
            process.wait(max(0.0, until - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
