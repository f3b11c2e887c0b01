"""A prompt file that several processes work through: shared, resumed, and told apart in the results."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from generate_runs import TINY

from t3.batch import Batch
from t3.claims import claim_path, take
from t3.generate import build_parser
from t3.jobs import Clip, Job, make_jobs
from t3.parallel.split import Split
from t3.parallel.team import Team
from t3.parallel.world import World

ROOT = Path(__file__).resolve().parent.parent


def jobs_in(folder: Path, *names: str, latents: bool = False) -> list[Job]:
    clip = Clip("", "", 64, 96, 5, 1, 1.0, 0)
    return [Job(name, clip, folder / f"{name}.mp4", folder / f"{name}.latent" if latents else None) for name in names]


def batch_of(jobs: list[Job], overwrite: bool = False) -> Batch:
    return Batch(jobs, argparse.Namespace(prompts="list.txt", overwrite=overwrite))


ALONE = Team(World(), Split())


def test_a_clip_is_claimed_while_it_is_made_and_given_back_after_a_fault(tmp_path):
    jobs = jobs_in(tmp_path, "a", "b", "c")
    jobs[1].out.touch()
    taken = batch_of(jobs).of_team(ALONE)
    first = next(taken)
    assert first.name == "a" and claim_path(first.out).exists() and take(first.out) is None
    assert next(taken).name == "c", "what another process finished is left out"
    assert not claim_path(first.out).exists()
    taken.close()
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]


def test_both_files_must_be_there(tmp_path):
    (job,) = jobs_in(tmp_path, "a", latents=True)
    batch = batch_of([job])
    job.out.touch()
    assert not batch.is_finished(job)
    job.latents.touch()
    assert batch.is_finished(job)


def test_what_is_replaced_is_done_once_it_is_new(tmp_path):
    (job,) = jobs_in(tmp_path, "a")
    job.out.touch()
    os.utime(job.out, (1, 1))
    batch = batch_of([job], overwrite=True)
    assert not batch.is_finished(job) and batch_of([job]).is_finished(job)
    after = time.time() + 1
    os.utime(job.out, (after, after))
    assert batch.is_finished(job)


def test_the_outcome_counts_every_clip_once(tmp_path):
    jobs = jobs_in(tmp_path, "made", "tried", "failed", "other", "held", "lost")
    for job in (jobs[0], jobs[1], jobs[3]):
        job.out.touch()
    held = take(jobs[4].out)
    results = [
        {"name": "made", "status": "done"},
        {"name": "tried", "status": "done"},
        {"name": "tried", "status": "failed", "error": "no memory"},
        {"name": "failed", "status": "failed", "error": "bad"},
    ]
    clips, elsewhere = batch_of(jobs).outcome(results)
    assert {clip["name"]: clip["status"] for clip in clips} == {
        "made": "done",
        "tried": "done",
        "failed": "failed",
        "other": "done",
        "lost": "failed",
    }
    assert len(clips) == 5 and elsewhere == ["held"]
    assert [clip["name"] for clip in clips if "by" in clip] == ["other"]
    held.release()


def test_a_file_where_one_prompt_s_clip_was_to_be_is_not_that_clip(tmp_path):
    """Without a prompt file there is nobody else who would make the same."""
    (job,) = jobs_in(tmp_path, "a")
    job.out.touch()
    failed = {"name": "a", "status": "failed", "error": "exists already"}
    assert Batch([job], argparse.Namespace(prompts=None, overwrite=False)).outcome([failed]) == ([failed], [])
    assert batch_of([job]).outcome([failed])[0][0]["by"] == "another process"


@pytest.mark.parametrize("decoded", [True, False])
def test_a_claim_that_a_killed_process_left_on_a_finished_clip_goes_when_the_command_is_run_again(tmp_path, decoded):
    (tmp_path / "list.txt").write_text("one\ntwo\nthree\n")
    out, suffix = tmp_path / "made", ".mp4" if decoded else ".latent"
    where = ["--out", str(out)] if decoded else ["--no-decode", "--latents-out", str(out)]
    code = "import sys; from pathlib import Path; from t3.claims import take; assert take(Path(sys.argv[1]))"
    first, second = (out / f"000{i}-{name}{suffix}" for i, name in ((1, "one"), (2, "two")))
    subprocess.run([sys.executable, "-c", code, str(first)], check=True, cwd=ROOT)
    living = take(second)
    for path in (first, second):
        path.write_bytes(b"made")
    assert claim_path(first).exists()
    size = ["--height", "64", "--width", "96", "--frames", "5", "--fps", "16"]
    jobs, done = make_jobs(build_parser().parse_args(["--prompts", str(tmp_path / "list.txt"), *size, *where]))
    assert [job.name for job in jobs] == ["0003-three"] and done == 2
    assert not claim_path(first).exists() and living.path.exists()


def test_a_prompt_has_its_own_images_or_those_of_all(tmp_path):
    for name in ("a", "b", "own-a", "own-b"):
        (tmp_path / f"{name}.png").touch()
    entries = [{"prompt": "x", "image": "own-a.png", "last_image": "own-b.png"}, "y"]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    images = ["--image", str(tmp_path / "a.png"), "--last-image", str(tmp_path / "b.png")]
    where = ["--prompts", str(tmp_path / "list.json"), "--out", str(tmp_path / "out"), "--fps", "16"]
    clips = [job.clip for job in make_jobs(build_parser().parse_args([*where, *TINY, *images]))[0]]
    found = [(clip.image.name, clip.last_image.name) for clip in clips]
    assert found == [("own-a.png", "own-b.png"), ("a.png", "b.png")]


def test_one_prompt_is_not_claimed(tmp_path):
    jobs = jobs_in(tmp_path, "a")
    taken = Batch(jobs, argparse.Namespace(prompts=None, overwrite=False)).of_team(ALONE)
    assert [job.name for job in taken] == ["a"] and not list(tmp_path.iterdir())


def generate(folder: Path, model: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "t3.generate", *TINY, "--model", str(model)]
    return subprocess.Popen(
        [*command, "--prompts", str(folder / "list.txt"), "--out", str(folder / "clips"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_make_each_clip_once_and_what_a_killed_one_left_is_made_later(tmp_path, tiny_model):
    names = [f"clip {i}" for i in range(5)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    clips = tmp_path / "clips"
    both = [generate(tmp_path, tiny_model) for _ in range(2)]
    # One is killed in the middle of its second clip or so; hidden files are also there while places are tried at first.
    end = time.monotonic() + 120
    while len(list(clips.glob("[!.]*.mp4"))) < 2 and time.monotonic() < end and both[0].poll() is None:
        time.sleep(0.02)
    both[0].send_signal(signal.SIGKILL)
    both[0].communicate(timeout=60)
    out, err = both[1].communicate(timeout=120)
    assert both[1].returncode == 0, err
    result = json.loads(out)
    assert result["ok"] and not result["elsewhere"]
    assert len(list(clips.glob("*.mp4"))) == 5
    assert {clip["status"] for clip in result["clips"]} == {"done"}
    assert not list(clips.glob("*.claim")) and not list(clips.glob(".*.claim"))
    again = generate(tmp_path, tiny_model)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads(out)["already_done"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("made", [True, False])
def test_all_is_on_disk_when_a_process_ends_well(tmp_path, tiny_model, made):
    """Another process, this one, holds the second clip until the first is there; it makes it, or drops it."""
    (tmp_path / "list.txt").write_text("one\ntwo\n")
    clips = tmp_path / "clips"
    held = take(clips / "0002-two.mp4")
    process = generate(tmp_path, tiny_model)
    assert any("waiting    for 0002-two.mp4" in line for line in process.stderr)
    assert (clips / "0001-one.mp4").exists() and process.poll() is None
    if made:
        (clips / "0002-two.mp4").touch()
    held.release()
    out, _ = process.communicate(timeout=60)
    result = json.loads(out)
    assert process.returncode == 0 and result["ok"] and not result["elsewhere"]
    assert ["by" in clip for clip in result["clips"]] == [False, made]
    assert (clips / "0002-two.mp4").exists()


@pytest.mark.slow
def test_the_benchmark_runs_on_cpus(tmp_path):
    out = tmp_path / "rows.json"
    script = str(ROOT / "benchmarks/parallel_batch.py")
    command = [sys.executable, script, "--tiny", "--gpus", "2", "--clips", "2", "--no-kill", "--out", str(out)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(out.read_text())["runs"]
    assert run["status"] == 0 and run["ok"] and run["clips"] == 2 and run["split"] == "data 2"
    assert run["again"] == {"already_done": 2, "made": 0}


@pytest.mark.slow
def test_the_benchmark_tells_why_a_run_failed(tmp_path):
    (tmp_path / "list.txt").write_text("one\n")
    script, missing = ROOT / "benchmarks/parallel_batch.py", tmp_path / "no model"
    code = f"""
import argparse, json, sys, time
from pathlib import Path
sys.path.insert(0, {str(script.parent)!r})
from parallel_batch import timed
folder = Path({str(tmp_path)!r})
options, stop = argparse.Namespace(tiny=True), time.monotonic() + 60
row = timed(options, Path({str(missing)!r}), folder / "list.txt", folder, 1, stop)
print(json.dumps(row))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["status"] not in (0, None) and "no model" in row["failed"] and "clips" not in row
