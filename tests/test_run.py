"""`run.py`: the command that sets up and hands over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Takes its time to put things away, as a training run does that writes a checkpoint.
SLOW = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text("put away")
    sys.exit(130)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize(("kind", "everyone"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_command_that_is_asked_to_end_ends_in_its_own_time(tmp_path, kind, everyone):
    """Ctrl-C reaches everyone in the terminal; a job's end only the process that was started."""
    over = f"import run, sys; sys.exit(run.hand_over([sys.executable, '-c', {SLOW!r}, {str(tmp_path / 'kept')!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", over], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    (os.killpg if everyone else os.kill)(process.pid, kind)
    assert process.wait(30) == 130 and time.monotonic() - started > 0.9
    assert (tmp_path / "kept").read_text() == "put away"


@pytest.mark.skipif(os.name == "nt", reason="what POSIX does instead")
def test_where_a_process_cannot_be_replaced_it_is_waited_for(monkeypatch):
    import run

    asked = []

    class Child:
        def __init__(self, command):
            self.command = command

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            asked.append(1)
            if len(asked) < 3:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(run.subprocess, "Popen", Child)
    monkeypatch.setattr(run.os, "name", "nt")
    try:
        assert run.hand_over(["python"]) == 130 and len(asked) == 3
    finally:
        monkeypatch.undo()
