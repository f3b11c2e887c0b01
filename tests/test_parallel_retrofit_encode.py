"""A data set encoded by two processes against one."""

import pytest
import torch
from parallel_fixtures import torchrun
from small_models import build
from test_retrofit_encode import write_video

from t3.retrofit.command import main
from t3.retrofit.shards import open_shards


@pytest.mark.slow
def test_two_processes_share_the_encode_of_each_clip(tmp_path):
    model, videos = build("t2v", tmp_path / "model"), tmp_path / "videos"
    videos.mkdir()
    for name in ("a", "b"):
        write_video(videos / f"{name}.mp4")
        (videos / f"{name}.txt").write_text(f"a grey clip {name}\n", encoding="utf-8")
    (videos / "corrupt.mp4").write_bytes((videos / "a.mp4").read_bytes()[:500])
    (videos / "corrupt.txt").write_text("corrupt")
    common = ["encode", str(videos), "--model", str(model), "--size", "32x48", "--frames", "9", "--device", "cpu"]
    common += ["--dtype", "fp32", "--out"]
    assert main([*common, str(tmp_path / "one")]) == 0
    done = torchrun(2, "-m", "t3.retrofit", *common, tmp_path / "two", timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 clips encoded") == 1 and "1 skipped" in done.stderr
    one, two = (open_shards(tmp_path / name) for name in ("one", "two"))
    assert [clip.facts for clip in one.clips] == [clip.facts for clip in two.clips] and len(one.clips) == 2
    for number in range(2):
        wanted, found = one.load(number), two.load(number)
        assert wanted.latents.shape == found.latents.shape
        # Other tiles, and stored in 16 bits: a sum may end on the other side of a half.
        torch.testing.assert_close(found.latents.float(), wanted.latents.float(), rtol=2**-7, atol=1e-3)
    again = torchrun(2, "-m", "t3.retrofit", *common, tmp_path / "two", timeout=200)
    assert again.returncode == 0 and "3 were done before" in again.stderr


@pytest.mark.slow
def test_own_samples_by_several_processes_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("a kite\n")
    model = build("t2v", tmp_path / "model")
    arguments = ["--own-samples", tmp_path / "prompts.txt", "--model", model, "--out", tmp_path / "set"]
    done = torchrun(2, "-m", "t3.retrofit", "encode", *arguments, "--size", "32x48", "--frames", "9")
    assert done.returncode != 0 and "own samples are made by one process" in done.stderr
    assert not (tmp_path / "set").exists()
