"""Latents that wait on disk for their decode: what takes them up again, what does not, and that none are lost."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from generate_runs import TINY, files, frames_of, run
from PIL import Image
from small_models import build

from t3 import decode, jobs
from t3.latents import load_latents
from t3.pipeline import Engine
from t3.sources import find_sources


@pytest.fixture
def tiny(tiny_model):
    """Arguments for a clip by the small model."""
    return [*TINY, "--model", str(tiny_model), "--prompt", "a red square moving left"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_decode(patch):
    """Let every decode fail."""
    patch.setattr(jobs, "_frames", lambda *a: (_ for _ in ()).throw(OSError("disk")))


def meanwhile(patch, *paths, content=b"somebody else's"):
    """Let another process write these files while a clip is sampled."""
    sample = Engine.sample

    def and_write(self, clip):
        latents = sample(self, clip)
        for path in paths:
            path.write_bytes(content)
        return latents

    patch.setattr(Engine, "sample", and_write)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("too big")])
def test_a_failed_decode_keeps_the_sampling(capsys, here, tiny, tiny_model, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(jobs, "_frames", fail)
    arguments = [*tiny, "--out", "clip.mp4", "--json"]
    status, result, err = run(capsys, *arguments)
    assert status == 1 and result["clips"][0]["status"] == "failed"
    assert files(here) == ["clip.latent"]
    assert "not lost" in err and "t3.decode" in err
    latents = load_latents("clip.latent")[0]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run(capsys, "clip.latent", "--vae", tiny_model, "--out", "later.mp4", main=decode.main)[0] == 0
    # The same command again takes the latents up instead of sampling again.
    status, result, err = run(capsys, *arguments)
    assert status == 0 and "sampled before" in err and "sample" not in result["seconds"]
    assert files(here) == ["clip.mp4", "later.mp4"]
    assert np.array_equal(frames_of("clip.mp4").shape, frames_of("later.mp4").shape)
    assert latents.shape == (1, 16, 2, 8, 12)


def test_other_settings_do_not_take_over_kept_latents(capsys, here, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        no_decode(patch)
        run(capsys, *tiny, "--out", "clip.mp4", "--seed", 1)
    kept = (here / "clip.latent").read_bytes()
    status, result, _ = run(capsys, *tiny, "--out", "clip.mp4", "--seed", 2, "--json")
    assert status == 0 and "sample" in result["seconds"]
    assert (here / "clip.latent").read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "reused"), [(["--fps", "12"], True), (["--steps", "3"], False), (["--shift", "3"], False)]
)
def test_a_folder_of_latents_is_decoded_or_refused_before_anything_is_sampled(capsys, here, tiny_model, change, reused):
    """A frame rate does not change what is sampled; whatever does must not cost a sampling that cannot be kept."""
    (here / "list.txt").write_text("a kite\n")
    common = [*TINY, "--model", tiny_model, "--prompts", "list.txt", "--latents-out", "kept", "--json"]
    assert run(capsys, *common, "--no-decode")[0] == 0
    (kept,) = (here / "kept").iterdir()
    before = kept.read_bytes()
    status, result, err = run(capsys, *common, "--out", "clips", *change)
    assert "sample" not in result["seconds"] and kept.read_bytes() == before
    if reused:
        assert status == 0 and "sampled before" in err and files(here / "clips") == ["0001-a-kite.mp4"]
        return
    assert status == 1 and "holds latents of other settings. Nothing was sampled" in result["clips"][0]["error"]
    assert run(capsys, *common, "--out", "clips", *change, "--overwrite")[0] == 0
    assert kept.read_bytes() != before


def test_latents_are_kept_though_their_name_is_taken_while_they_are_sampled(capsys, here, tiny, monkeypatch):
    no_decode(monkeypatch)
    meanwhile(monkeypatch, here / "clip.latent")
    status, _, err = run(capsys, *tiny, "--out", "clip.mp4")
    assert status == 1 and "the latents are in" in err
    assert files(here) == ["clip-2.latent", "clip.latent"]
    assert load_latents("clip-2.latent")[0].shape == (1, 16, 2, 8, 12)


def test_the_same_latents_of_another_process_do_not_cost_those_sampled_here(capsys, here, tiny, monkeypatch):
    """Two runs of one command: the other's latents go with its decode, so this one's need a name of their own."""
    with monkeypatch.context() as patch:
        no_decode(patch)
        run(capsys, *tiny, "--out", "clip.mp4")
    same = (here / "clip.latent").read_bytes()
    (here / "clip.latent").unlink()
    no_decode(monkeypatch)
    meanwhile(monkeypatch, here / "clip.latent", content=same)
    status, _, err = run(capsys, *tiny, "--out", "clip.mp4")
    assert status == 1 and "the latents are in clip-2.latent" in err
    assert load_latents("clip-2.latent")[0].equal(load_latents("clip.latent")[0])


def test_somebody_else_s_clip_under_the_name_of_one_prompt_is_no_success(capsys, here, tiny, monkeypatch):
    meanwhile(monkeypatch, here / "clip.mp4")
    status, result, err = run(capsys, *tiny, "--out", "clip.mp4", "--json")
    (clip,) = result["clips"]
    assert status == 1 and not result["ok"] and clip["status"] == "failed" and "exists already" in clip["error"]
    assert (here / "clip.mp4").read_bytes() == b"somebody else's" and "not lost" in err
    assert load_latents("clip.latent")[0].isfinite().all()


def test_another_picture_under_the_same_name_is_sampled_from(capsys, here, monkeypatch):
    model = build("ti2v-5b", here / "model")
    asked = [*TINY, "--model", model, "--prompt", "a kite", "--image", "start.png", "--out", "clip.mp4", "--json"]
    Image.new("RGB", (96, 64), "red").save("start.png")
    with monkeypatch.context() as patch:
        no_decode(patch)
        run(capsys, *asked)
    assert Path("clip.latent").exists()
    Image.new("RGB", (96, 64), "blue").save("start.png")
    with monkeypatch.context() as patch:
        no_decode(patch)
        assert "sample" in run(capsys, *asked)[1]["seconds"]
    status, result, err = run(capsys, *asked)
    assert status == 0 and "sampled before" in err and "sample" not in result["seconds"]
    assert Path("clip.latent").exists() and not Path("clip-2.latent").exists()


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_latents_are_of_the_model_s_files_as_they_were(tmp_path, kind):
    """Of all that decide what is sampled: whoever puts another text encoder there must not get the old clip."""
    folder = build(kind, tmp_path / "model")

    def marks():
        return find_sources(model=str(folder)).fingerprint()

    before = marks()
    assert before == marks()
    seen = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, ns=(1, 1))
        after = marks()
        if after != before:
            seen.add(path.parent.name)
        before = after
    assert seen == {"transformer", "text_encoder", "tokenizer"} | ({"vae"} if kind == "vace" else set())
