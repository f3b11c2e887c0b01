"""Ranks that fail, die, never come or are different: what is said, how all end, and what is left on disk."""

import json
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from parallel_faults import nobodys
from parallel_fixtures import ROOT, TESTS, ends, environment, start_ranks, start_torchrun

from t3.errors import T3Error
from t3.generate import main as generate_main
from t3.parallel.world import World

SMALL = ["--height", "32", "--width", "64", "--frames", "5", "--steps", "1", "--device", "cpu", "--json"]
SECONDS = 60  # to start and to end; what hangs takes 100 or an hour


@pytest.fixture(scope="module", autouse=True)
def small(tiny_model):
    """`SMALL` names the model."""
    SMALL.extend(["--model", str(tiny_model)])


def program(fault, rank, *arguments):
    prompt = [] if "--prompts" in arguments else ["--prompt", "a kite"]
    return [str(TESTS / "parallel_generate.py"), fault, str(rank), *SMALL, *prompt, *map(str, arguments)]


def generate(fault, rank, *arguments, size=2):
    return start_ranks(size, *program(fault, rank, *arguments))


def statuses(found):
    return [status for status, _, _ in found]


def said(found):
    """Lines on the screen that name the command, behind a progress bar perhaps."""
    return [line for _, _, err in found for line in err.splitlines() if "t3.generate:" in line]


def files(folder):
    """All that is there under a final name."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def batch(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n", encoding="utf-8")
    return ["--prompts", prompts, "--out", tmp_path / "out"], tmp_path / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "split"),
    [("sampling", 1, "sequence=2"), ("sampling", 0, "guidance=2"), ("decode", 1, "guidance=2")],
)
def test_a_killed_rank_ends_all_and_finished_clips_stay(batch, fault, rank, split):
    arguments, out = batch
    found = ends(generate(fault, rank, *arguments, "--split", split), SECONDS)
    assert statuses(found)[rank] == -9
    assert statuses(found)[1 - rank] == 1
    # Once, and what happened.
    (line,) = said(found)
    assert f"rank {rank}: process" in line and "gone" in line and "finished stay" in line
    if rank == 1:
        assert json.loads(found[0][1])["status"] == 1
    # The second clip's latents wait for the decode, if it came to that.
    assert files(out) == ["0001-one.mp4", *(["0002-two.latent"] if fault == "decode" else [])]


def test_a_rank_killed_while_it_writes_leaves_no_half_clip(tmp_path):
    found = ends(generate("writing", 0, "--out", tmp_path / "a.mp4", "--split", "sequence=2"), SECONDS)
    assert statuses(found) == [-9, 1]
    assert files(tmp_path) == ["a.latent"]


def test_a_rank_that_fails_says_why_and_ends_all(tmp_path):
    found = ends(generate("error", 1, "--out", tmp_path / "a.mp4", "--split", "guidance=2"), SECONDS)
    assert statuses(found) == [1, 1]
    (line,) = said(found)
    assert "rank 1: RuntimeError: the card fell off the bus" in line
    assert "the card fell off the bus" in json.loads(found[0][1])["error"]
    assert not files(tmp_path)


@pytest.mark.slow
def test_ranks_that_wait_in_a_library_end_too(tmp_path):
    found = ends(generate("deaf", "all", "--out", tmp_path / "a.mp4", "--split", "guidance=2"), SECONDS)
    assert statuses(found) == [1, -9]
    (line,) = said(found)
    assert "rank 1: process" in line


def wait_for_sampling(processes, count):
    """The ids of `count` processes that say that they sample, on the screens of `processes`."""
    pids = []
    for process in processes:
        for line in process.stderr:
            if found := re.search(r"sampling in process (\d+)\.", line):
                pids.append(int(found[1]))
                if len(pids) == count or len(processes) > 1:
                    break
    assert len(pids) == count
    return pids


def alive(pid):
    """Whether a process is there, and not only its name in the list of its parent."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_an_interruption_is_said_once_and_leaves_nothing(tmp_path):
    processes = generate("slow", "all", "--out", tmp_path / "a.mp4", "--split", "sequence=2")
    wait_for_sampling(processes, 2)
    for process in processes:
        process.send_signal(signal.SIGINT)
    found = ends(processes, SECONDS)
    assert statuses(found) == [130, 130]
    (line,) = said(found)
    assert "interrupted" in line
    assert not files(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_rank_outlives_torchrun(tmp_path):
    launcher = start_torchrun(2, *program("slow", "all", "--out", tmp_path / "a.mp4", "--split", "sequence=2"))
    pids = wait_for_sampling([launcher], 2)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + SECONDS
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(alive, pids))
    launcher.communicate()


def test_mixed_versions_are_named():
    found = ends(generate("version", 1, "--no-decode", "--latents-out", "never.latent"), SECONDS)
    assert statuses(found) == [2, 2]
    (line,) = said(found)
    assert "mixed versions" in line and "rank 1" in line and "t3 0.0.0" in line


def test_a_rank_that_never_comes_is_missed(tmp_path):
    found = ends(generate("absent", 1, "--out", tmp_path / "a.mp4"), SECONDS)
    assert statuses(found) == [2, 0]
    (line,) = said(found)
    assert "2 processes were announced" in line and "rank 1 did not come" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "sequence=3"], "3 processes (3), and 2 were started"),
        (["--split", "sequence=2", "--compile"], "--compile does not go"),
        # Found before the ranks know of each other: where no torchrun ends the others, each says it.
        (["--steps", "0"], "--steps is 0"),
        (["--device", "cuda:0"], "each takes the card of its own number"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, arguments, words):
    found = ends(generate("none", 0, "--out", tmp_path / "a.mp4", *arguments), SECONDS)
    assert statuses(found) == [2, 2]
    lines = said(found)
    assert len(lines) == (1 if "--split" in arguments else 2)
    assert all(words in line for line in lines)
    assert json.loads(found[0][1])["status"] == 2
    assert not found[1][1]
    assert not files(tmp_path)


def test_a_dry_run_shows_the_split_and_starts_nothing(monkeypatch, capsys):
    # No other rank is there, and no address.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert generate_main([*SMALL, "--prompt", "a kite", "--dry-run"]) == 0
    split = json.loads(capsys.readouterr().out)["split"]
    assert (split["guidance"], split["sequence"], split["ranks"]) == (2, 2, 4)
    assert split["tokens_per_rank"] == [8] * 4


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is None"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks count from 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environ, words):
    with pytest.raises(T3Error, match=words):
        World.from_environment(environ)


def test_one_process_needs_no_environment():
    world = World.from_environment({})
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.start().share(3) == 3 and world.gather(4) == [4]
    world.close()


@pytest.mark.slow
def test_torchrun_ends_with_its_ranks(batch):
    arguments, out = batch
    torchrun = start_torchrun(2, *program("sampling", 1, *arguments, "--split", "sequence=2"))
    ((status, _, err),) = ends([torchrun], SECONDS)
    assert status == 1
    assert "t3.generate: rank 1: process" in err
    assert files(out) == ["0001-one.mp4"]


@pytest.mark.parametrize(
    ("cards", "nccl", "name", "words"),
    [
        (0, True, "cuda", "2 processes were started on this machine, and it has 0 CUDA cards"),
        (1, True, "auto", "use --nproc-per-node 1"),
        (2, False, "cuda", "built without NCCL.*--shard"),
        (2, True, "cuda:1", "Use --device cuda"),
        (2, True, "mps", "Use --device cuda"),
    ],
)
def test_cards_and_nccl_are_looked_for_first(monkeypatch, cards, nccl, name, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    with pytest.raises(T3Error, match=words):
        World(rank=1, size=2, local_rank=1, local_size=2).start(name)


def test_ranks_find_what_lies_on_the_path_already(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "packages")
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(TESTS), "packages"]
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(TESTS)]


def test_what_is_kept_of_a_fault_names_neither_machine_nor_folders():
    frame = f'  File "{ROOT / "t3" / "generate.py"}", line 234, in _generate'
    assert nobodys(frame) == f'  File "t3{os.sep}generate.py", line 234, in _generate'
    assert nobodys('File "/opt/some.where/lib/python3.12/site-packages/torch/run.py", line 1') == (
        'File ".../run.py", line 1'
    )
    assert nobodys(r'File "C:\Users\me\torch\run.py", line 1') == 'File ".../run.py", line 1'
    assert nobodys(f"host      : {platform.node()}\nrank      : 1") == "host      : HOST\nrank      : 1"
    # No paths: fractions, addresses of the web, tests of a number.
    for text in ("1/2 done", "see https://pytorch.org/docs/stable/elastic/errors.html", "tests/parallel.py FAILED"):
        assert nobodys(text) == text
