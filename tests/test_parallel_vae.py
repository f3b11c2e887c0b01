"""Decode and encode over gloo processes: the bits of one process, faults of any rank, ends of a rank."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_fixtures import TESTS, start_ranks, torchrun
from parallel_fixtures import ends as ends_of
from PIL import Image
from safetensors.torch import save_file
from vae_fixtures import random_latents, random_state

from t3 import decode
from t3.latents import save_latents

ROOT = Path(__file__).resolve().parent.parent


def start(work: str, size: int, folder: Path) -> list[subprocess.Popen]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    script = str(Path(__file__).with_name("parallel_vae_worker.py"))
    return [
        subprocess.Popen(
            [sys.executable, script, work, str(rank), str(size), str(folder)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    """Exit status and output of each; all of them are gone after this."""
    try:
        found = []
        for process in processes:
            output, _ = process.communicate(timeout=seconds)
            found.append((process.returncode, output))
        return found
    finally:
        for process in processes:
            process.kill()


def found(work: str, size: int, folder: Path) -> list:
    """What each rank found."""
    ended = ends(start(work, size, folder), 240)
    assert all(status == 0 for status, _ in ended), "\n".join(output for _, output in ended)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_the_bits_of_one_process(tmp_path, size):
    reports = found("equal", size, tmp_path)
    for case in zip(*reports, strict=True):
        shares = [(report["own_tiles"], report["own_frames"]) for report in case]
        assert sum(tiles for tiles, _ in shares) == case[0]["tiles"]
        assert 0.3 < case[0]["balance"] <= 1


def test_a_rank_without_memory_goes_on_in_smaller_tiles_and_a_fault_is_told(tmp_path):
    first, second = found("fallbacks", 2, tmp_path)
    assert len(first) == 4 and all(text.startswith("rank 1: decode: memory ran out") for text in first[:3])
    assert "gave NaN" in first[3]
    assert second == first[3:]


def test_rank_0_holds_no_more_than_one_process_does(tmp_path):
    """But for a tile's pixels, at most: the clip itself is given, and what others send is written on as it comes."""
    first, second = found("memory", 2, tmp_path)
    assert first["shared"] < first["alone"] + first["piece"]
    # Another rank holds no clip either (15 pieces). How much of a second piece is there at its peak, timing decides.
    assert second["shared"] < first["alone"] + 2 * first["piece"]


def test_all_ranks_refuse_alike(tmp_path):
    first, second = found("refused", 2, tmp_path)
    assert first == second and len(first) == 3
    assert "48 channels" in first[0] and "memory is 1,000 bytes" in first[1] and "out has shape" in first[2]


def test_a_killed_rank_ends_the_others_with_a_reason(tmp_path):
    processes = start("killed", 3, tmp_path)
    try:
        assert processes[2].wait(timeout=120) == -9
        begin = time.monotonic()
        (first, said), (second, _) = ends(processes[:2], 30)
    finally:
        for process in processes:
            process.kill()
    assert (first, second) == (7, 7), said
    assert time.monotonic() - begin < 15
    assert "RankLost: rank 0 of 3: another process is gone" in said


@pytest.fixture
def saved(tmp_path):
    """A small VAE and latents as files; the arguments of t3.decode for them."""
    vae, latents = tmp_path / "vae.safetensors", tmp_path / "clip.latent"
    save_file(random_state("wan2.1-vae", dtype=torch.float32), vae)
    save_latents(latents, random_latents("wan2.1-vae", 3, 8, 13, dtype=torch.float32))
    return [latents, "--vae", vae, "--dtype", "fp32", "--device", "cpu", "--json", "--out"]


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_the_command_under_torchrun_writes_what_one_process_writes(saved, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert decode.main([str(argument) for argument in (*saved, f"{one}/")]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 1
    done = torchrun(2, "-m", "t3.decode", *saved, f"{two}/")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ranks"] == 2 and result["shares"]["tiles"] >= 2 and 0 < result["shares"]["balance"] <= 1
    found, wanted = pictures(two), pictures(one)
    assert found.shape == wanted.shape == (9, 64, 104, 3)
    # Other tiles than those of one process: sums in float32 may end on the other side of a half.
    assert np.abs(found.astype(int) - wanted).max() <= 1 and (found != wanted).mean() < 1e-3


def test_a_rank_killed_in_the_command_leaves_no_file_and_the_latents(saved, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    clip = tmp_path / "clip.mp4"
    program = [TESTS / "parallel_decode_killed.py", *saved, clip]
    first, second = ends_of(start_ranks(2, *map(str, program)), 90)
    assert (first[0], second[0]) == (1, -9), first[2]
    (line,) = [line for line in first[2].splitlines() if "t3.decode:" in line]
    assert "rank 1: process" in line and "gone" in line
    assert json.loads(first[1])["status"] == 1
    assert {path.name for path in tmp_path.iterdir()} == before, "no half file, hidden or not; the latents are there"


@pytest.mark.slow
def test_the_benchmark_runs_on_cpus(tmp_path):
    out = tmp_path / "rows.json"
    script = ROOT / "benchmarks/parallel_decode.py"
    done = torchrun(2, script, "--tiny", "--cpu", "--frames", "5", "--vaes", "2.1", "--out", out, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    both = [row for row in rows if row["ranks"] == 2]
    assert [row["case"] for row in both] == ["decode 2.1", "encode 2.1"]
    assert all(row["bit_equal"] and row["speedup"] > 0 and len(row["of_each_rank"]) == 2 for row in both)
    assert "| decode 2.1 | all ranks | 2 |" in done.stdout
