"""Claims on clips: one of many gets it, and what dead processes hold is free."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t3 import claims
from t3.claims import Shared, claim_path, take
from t3.errors import T3Error

ROOT = Path(__file__).resolve().parent.parent

# Takes every clip of a list that it can get, and writes down which. Holds its first until all the named have one, so
# that none is too late for the race. Dies in the middle of one, or when it has made one but still holds it, if told so.
WORKER = """
import os, sys, time
from pathlib import Path
from t3.claims import Shared
folder, name, dies, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
jobs = [f"clip-{i}" for i in range(24)]
for job, claim in Shared(jobs, lambda job: folder / job, lambda job: (folder / job).exists()):
    with claim:
        with open(folder / f"{name}.log", "a") as log:
            log.write(job + "\\n")
        while not all((folder / f"{one}.log").exists() for one in names):
            time.sleep(0.001)
        if job == dies:
            os.kill(os.getpid(), 9)
        time.sleep(0.01)
        with open(folder / job, "x") as clip:
            clip.write(name)
        if dies == "made " + job:
            os.kill(os.getpid(), 9)
"""


def workers(folder: Path, names: list[str], dies: dict[str, str]) -> list[subprocess.Popen]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen([sys.executable, "-c", WORKER, str(folder), name, dies.get(name, ""), *names], env=environ)
        for name in names
    ]


def logged(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.log"
    return path.read_text().split() if path.exists() else []


def test_of_processes_that_race_each_clip_is_made_by_one(tmp_path):
    started = workers(tmp_path, ["a", "b", "c"], {})
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0]
    made = [job for name in "abc" for job in logged(tmp_path, name)]
    assert sorted(made) == sorted(f"clip-{i}" for i in range(24)), "each once"
    assert all(logged(tmp_path, name) for name in "abc")
    assert not list(tmp_path.glob(".*")), "claims are given back"


def test_what_a_killed_process_held_is_made_by_another(tmp_path):
    (killed,) = workers(tmp_path, ["a"], {"a": "clip-3"})
    assert killed.wait(timeout=60) == -9
    assert not (tmp_path / "clip-3").exists() and claim_path(tmp_path / "clip-3").exists()
    (other,) = workers(tmp_path, ["b"], {})
    assert other.wait(timeout=60) == 0
    assert logged(tmp_path, "b") == [f"clip-{i}" for i in range(3, 24)], "and what was finished is not made again"


def test_of_a_process_that_was_killed_with_its_clip_made_no_claim_is_left(tmp_path):
    (killed,) = workers(tmp_path, ["a"], {"a": "made clip-3"})
    assert killed.wait(timeout=60) == -9
    assert (tmp_path / "clip-3").exists() and claim_path(tmp_path / "clip-3").exists()
    (other,) = workers(tmp_path, ["b"], {})
    assert other.wait(timeout=60) == 0
    assert logged(tmp_path, "b") == [f"clip-{i}" for i in range(4, 24)]
    assert not list(tmp_path.glob(".*"))


def test_a_claim_on_a_finished_clip_stays_with_who_lives(tmp_path):
    (tmp_path / "clip").touch()
    with take(tmp_path / "clip") as claim:
        shared = Shared(["clip"], lambda job: tmp_path / job, lambda job: True)
        assert list(shared) == [] and shared.done == 1
        assert claim.path.exists()


def test_a_claim_that_cannot_be_removed_does_not_fail_a_finished_list(tmp_path, monkeypatch):
    (tmp_path / "clip").touch()
    foreign(tmp_path / "clip", pid=1)
    monkeypatch.setattr(Path, "write_text", lambda *text, **how: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(T3Error):
        take(tmp_path / "clip")
    assert list(Shared(["clip"], lambda job: tmp_path / job, lambda job: True)) == []
    assert claim_path(tmp_path / "clip").exists()


def foreign(output: Path, **changes) -> None:
    """Let a process of another machine claim this."""
    claim = take(output)
    holder = {**claim.holder.__dict__, "host": "elsewhere", **changes}
    claim.path.write_text(json.dumps(holder))


@pytest.mark.parametrize("name", ["clip [1].mp4", "frames"])
def test_what_a_dead_process_had_begun_is_removed(tmp_path, name):
    output = tmp_path / name
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    begun = {pid: tmp_path / f".{output.stem}.partial-{pid}-0123abcd{output.suffix}" for pid in (dead.pid, os.getpid())}
    for path in begun.values():
        (path.mkdir if name == "frames" else path.touch)()
    foreign(output, host=platform.node(), pid=dead.pid)
    assert take(output, tell=lambda text: None) is not None
    assert not begun[dead.pid].exists() and begun[os.getpid()].exists()


def test_a_claim_of_another_machine_is_free_when_it_is_not_touched(tmp_path):
    output, told = tmp_path / "clip.mp4", []
    foreign(output, pid=1)
    assert take(output, tell=told.append) is None and not told
    old = time.time() - claims.STALE_SECONDS - 60
    os.utime(claim_path(output), (old, old))
    claim = take(output, tell=told.append)
    assert claim is not None and take(output) is None
    assert len(told) == 1 and "elsewhere" in told[0] and "touched" in told[0]
    claim.release()
    assert not list(tmp_path.iterdir())


def test_a_number_given_to_a_new_process_is_not_taken_for_the_old_one(tmp_path):
    output = tmp_path / "clip.mp4"
    foreign(output, host=platform.node(), pid=os.getppid(), born=1.0)
    assert take(output, tell=lambda text: None) is not None


def test_only_one_takes_over(tmp_path):
    """Many see the same stale claim at once."""
    output = tmp_path / "clip.mp4"
    foreign(output, pid=1)
    os.utime(claim_path(output), (0, 0))
    found, gate = [], threading.Barrier(8)

    def race():
        gate.wait()
        found.append(take(output, tell=lambda text: None))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [claim for claim in found if claim is not None]
    assert winner.holder.token in claim_path(output).read_text()


def test_a_claim_that_another_took_over_is_not_given_back_by_the_first(tmp_path):
    output = tmp_path / "clip.mp4"
    first = take(output)
    foreign_text = json.dumps({**first.holder.__dict__, "token": "another"})
    first.path.write_text(foreign_text)
    first.release()
    assert first.path.read_text() == foreign_text


def test_a_claim_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 0.02)
    output = tmp_path / "clip.mp4"
    with take(output) as claim:
        os.utime(claim.path, (0, 0))
        end = time.monotonic() + 10
        while claim.path.stat().st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert claim.path.stat().st_mtime > 1
    assert not claim.path.exists()


def test_what_others_hold_is_waited_for(tmp_path):
    (tmp_path / "done").touch()
    foreign(tmp_path / "held")
    foreign(tmp_path / "dropped")
    jobs, said = ["done", "held", "dropped", "free"], []

    def tell(text):
        said.append(text)
        # They end while this one waits: one made its clip, and the other did not.
        if "held" in text:
            (tmp_path / "held").touch()
        for job in ("held", "dropped"):
            claim_path(tmp_path / job).unlink(missing_ok=True)

    shared = Shared(jobs, lambda job: tmp_path / job, lambda job: (tmp_path / job).exists(), look=0.01, tell=tell)
    mine = []
    for job, claim in shared:
        with claim:
            mine.append(job)
            (tmp_path / job).touch()
    assert mine == ["free", "dropped"] and shared.done == 2 and not shared.elsewhere
    assert said == ["waiting    for held, dropped, in the hands of other processes"]


def test_one_that_waits_is_told_once_how_many_are_left(tmp_path, monkeypatch):
    foreign(tmp_path / "a")
    looks, said = [], []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 6:
            (tmp_path / "a").touch()

    monkeypatch.setattr(claims.time, "sleep", sleep)
    shared = Shared(["a"], lambda job: tmp_path / job, lambda job: (tmp_path / job).exists(), tell=said.append)
    assert list(shared) == [] and shared.done == 1
    assert said == ["waiting    for a, in the hands of another process"]
    assert looks == [1, 2, 4, 8, 15, 15], "and looks less and less often"


def test_a_claim_that_was_cut_short_does_not_stay(tmp_path):
    output = tmp_path / "clip.mp4"
    claim_path(output).touch()
    assert take(output) is None
    os.utime(claim_path(output), (0, 0))
    assert take(output) is None
    assert take(output) is not None


def test_without_hard_links_claims_hold_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError("no links here")))
    output = tmp_path / "clip.mp4"
    claim = take(output)
    assert claim is not None and take(output) is None
    claim.release()
    assert take(output) is not None


def test_a_place_that_takes_no_files_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(T3Error, match="takes no files"):
        take(tmp_path / "file/clip.mp4")
