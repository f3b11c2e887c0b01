"""The embedded default: `python -m t3.generate` as people first run it, its clip measured from the pixels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from t3.embedded import embedded_folder
from t3.generate import EMBEDDED_DEFAULTS, EMBEDDED_PROMPT
from t3.weights import open_weights
from tools.small_model.detector import detect
from tools.small_model.export import sizes

ROOT = Path(__file__).resolve().parent.parent
SIZE = ["--height", "112", "--width", "160", "--frames", "5", "--steps", "1"]


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run it in `folder`, on two threads, as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "T3_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "t3.generate", *arguments, "--device", "cpu", "--json"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def clip_of(path: Path) -> torch.Tensor:
    """`[3, T, H, W]` in [-1, 1], as the detector takes it."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of everything in a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_it_fits_a_package_and_says_what_it_is():
    sizes(embedded_folder())
    for part in ("transformer", "vae", "text_encoder"):
        file = open_weights(embedded_folder() / part)
        assert {file.dtype(name) for name in file} == {"F16"}
    assert "Trained from nothing" in (embedded_folder() / "README.md").read_text(encoding="utf-8")


def test_its_plan_and_its_settings_are_its_own(tmp_path):
    done = generate(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["model"]["name"] == "embedded" and facts["tuned"] == "yes"
    assert facts["plan"]["reason"] == "carried by the weights"
    assert facts["grid"] == [6, 14, 20]
    # With guidance.
    assert EMBEDDED_DEFAULTS["cfg"] > 1 and facts["forward_passes"] == 2 * EMBEDDED_DEFAULTS["steps"]
    assert "No model was named" in done.stderr + done.stdout


def test_it_is_only_read(tmp_path):
    before = state(embedded_folder())
    done = generate(tmp_path, *SIZE, "--out", "clip.mp4")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dtype"] == "fp32"
    assert state(embedded_folder()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="measures the time of a child process")
def test_no_arguments_make_a_clip_of_one_red_thing_within_a_minute_of_two_cores(tmp_path):
    import resource

    assert EMBEDDED_PROMPT == "a red square moving left"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = generate(tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    clip = clip_of(tmp_path / "output" / "t3-00001.mp4")
    assert clip.shape == (3, 21, 224, 320)
    # Of the thing, the first to go wrong is how many there are (tools/small_model/README.md).
    found = detect(clip)
    assert set(found.things) == {"red"} and found.things["red"][1] == "square" and found.motion == "left"
    # Time of the processor, not of the clock: what else runs meanwhile does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 60
