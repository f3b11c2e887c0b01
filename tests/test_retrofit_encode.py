"""Clips to data sets with the real encoders of a small model: faults, buckets, going on; sampling while training."""

import json

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from retrofit_fixtures import write_config
from small_models import build

from t3.errors import T3Error
from t3.generate import main as generate
from t3.retrofit.buckets import NoBucket, choose, parse_size
from t3.retrofit.clips import BadClip, Clip, inspect_clip, list_clips, read_clip
from t3.retrofit.command import main
from t3.retrofit.encode import Encoders
from t3.retrofit.shards import ShardWriter, check_target, open_shards, read_shards

FRAMES = 9
SIZE = (32, 48)


def write_video(path, frames=FRAMES, height=64, width=96, rate=8):
    """A clip whose frame number is its grey level, a step of 20 each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "4", "bf": "0"}
        for number in range(frames):
            pixels = np.full((height, width, 3), 20 + 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build("t2v", tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(f"a grey clip {name}\n", encoding="utf-8")
    write_video(folder / "short.mp4", frames=3)
    (folder / "short.txt").write_text("short")
    whole = (folder / "a.mp4").read_bytes()
    (folder / "corrupt.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.txt").write_text("corrupt")
    write_video(folder / "silent.mp4")
    return folder


def encode(videos, model, out, *more):
    size = f"{SIZE[0]}x{SIZE[1]}"
    return main(
        ["encode", str(videos), "--out", str(out), "--model", str(model), "--size", size, "--frames", "9", *more]
    )


def test_faults_are_skipped_counted_and_named_and_a_second_run_goes_on(videos, model, tmp_path, capsys):
    out = tmp_path / "set"
    assert encode(videos, model, out) == 0
    said = capsys.readouterr().err
    assert "3 clips encoded" in said
    assert "2 skipped:" in said
    assert "corrupt.mp4: it cannot be opened" in said
    assert "short.mp4: it has 3 frames, and the shortest clips asked for have 9" in said
    assert "1 without a caption: silent.mp4" in said
    shards = open_shards(out)
    assert [clip.facts.source for clip in shards.clips] == ["a.mp4", "b.mp4", "c.mp4"]
    assert {entry["source"] for entry in shards.index["skipped"]} == {"corrupt.mp4", "short.mp4"}
    (out / "clips-00000.safetensors").touch()
    before = (out / "clips-00000.safetensors").stat().st_mtime_ns
    assert encode(videos, model, out) == 0
    assert "0 clips encoded, 5 were done before" in capsys.readouterr().err
    assert encode(videos, model, out, "--missing-captions", "empty", "--retry-skipped") == 0
    said = capsys.readouterr().err
    assert "1 clips encoded, 3 were done before" in said
    assert "2 skipped:" in said
    assert (out / "clips-00000.safetensors").stat().st_mtime_ns == before
    assert open_shards(out).clips[-1].facts.caption == ""


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--fps", "0", "frame rate of 0"),
        ("--fps", "nan", "nan is no frame rate"),
        ("--text-tokens", "0", "--text-tokens is 0"),
        ("--memory", "inf", "--memory is inf GB"),
        ("--steps", "0", "--steps is 0"),
        ("--cfg", "nan", "--cfg is nan"),
        ("--shift", "0", "--shift is 0"),
        ("--seed", str(2**64), "use 0 to 2^64 - 1"),
        ("--out", "", "folder has no name"),
    ],
)
def test_numbers_that_cannot_be_are_told_before_anything_is_written(
    videos, model, tmp_path, capsys, option, value, said
):
    assert encode(videos, model, tmp_path / "set", option, value) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_data_set_is_not_put_among_other_files(videos, model, tmp_path, capsys):
    """A shard in a model's folder would make it one of two sets of weights, of which neither can be told."""
    before = sorted(videos.iterdir())
    assert encode(videos, model, videos) == 2
    assert "is no data set, and holds other files" in capsys.readouterr().err
    assert sorted(videos.iterdir()) == before
    # What a killed run left is no stranger.
    (tmp_path / "set").mkdir()
    for name in ("clips-00000.safetensors", "empty-text.safetensors", ".index.json.claim"):
        (tmp_path / "set" / name).touch()
    check_target(tmp_path / "set")


def test_an_interrupted_encode_keeps_what_was_done(videos, model, tmp_path, monkeypatch):
    real, calls = Encoders.latents, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Encoders, "latents", interrupted)
    assert encode(videos, model, tmp_path / "set") == 130
    assert len(open_shards(tmp_path / "set").clips) == 2
    monkeypatch.setattr(Encoders, "latents", real)
    assert encode(videos, model, tmp_path / "set") == 0
    assert [clip.facts.source for clip in open_shards(tmp_path / "set").clips] == ["a.mp4", "b.mp4", "c.mp4"]


def test_a_folder_that_is_being_written_is_refused_and_clips_with_odd_names_are_kept(videos, model, tmp_path, capsys):
    """A table, since not every disk takes such a name; the file that it names is missing or there."""
    lines = [
        {"file": str(videos / "a.mp4"), "caption": "half of a character: \ud83d"},
        {"file": "\udce9.mp4", "caption": "missing"},
        {"file": str(videos / "b.mp4"), "caption": "b"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with ShardWriter(tmp_path / "set"):
        assert encode(tmp_path / "list.jsonl", model, tmp_path / "set") == 2
    assert f"{tmp_path / 'set'} is open for writing by process" in capsys.readouterr().err
    (tmp_path / "set" / "index.json").unlink()
    assert encode(tmp_path / "list.jsonl", model, tmp_path / "set") == 0
    assert "\\udce9.mp4: there is no such file" in capsys.readouterr().err
    captions = [clip.facts.caption for clip in open_shards(tmp_path / "set").clips]
    assert captions == ["half of a character: \ufffd", "b"]


def test_latents_and_texts_are_those_of_the_library(videos, model, tmp_path):
    from diffusers import WanPipeline

    assert encode(videos, model, tmp_path / "set") == 0
    pipe = WanPipeline.from_pretrained(model)
    clip = next(read_shards(tmp_path / "set"))
    frames = torch.stack([torch.full((*SIZE, 3), 20 + 20 * n) for n in range(FRAMES)])[None] / 127.5 - 1
    with torch.no_grad():
        wanted = pipe.vae.encode(frames.permute(0, 4, 1, 2, 3).float()).latent_dist.mode()[0]
        text, _ = pipe.encode_prompt(clip.facts.caption, do_classifier_free_guidance=False, max_sequence_length=64)
    mean, std = (torch.tensor(pipe.vae.config[k]).view(-1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    wanted = (wanted - mean) / std
    # bfloat16 keeps 8 bits; the video's own compression moves grey levels by less than 2 of 255.
    assert (clip.latents.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    count = clip.text.shape[0]
    torch.testing.assert_close(clip.text.float(), text[0, :count], rtol=1e-2, atol=1e-2)
    assert not text[0, count:].any()
    assert (clip.facts.frames, clip.facts.height, clip.facts.width, clip.facts.fps) == (9, *SIZE, 8.0)


def test_frames_are_taken_at_the_rate_asked_for(videos):
    from t3.retrofit.buckets import Bucket

    video, count = inspect_clip(videos / "a.mp4", 4.0)
    assert (video.height, video.width, video.fps, count) == (64, 96, 8.0, 5)
    frames = read_clip(videos / "a.mp4", Bucket(*SIZE, 5), 4.0)
    assert frames.shape == (1, 5, *SIZE, 3)
    levels = frames.float().mean((0, 2, 3, 4))
    assert (levels - torch.tensor([20.0, 60, 100, 140, 180])).abs().max() < 3
    with pytest.raises(BadClip, match="broke off after 9 of 10"):
        read_clip(videos / "a.mp4", Bucket(*SIZE, 10), None)
    with pytest.raises(BadClip, match="fewer frames a second"):
        read_clip(videos / "a.mp4", Bucket(*SIZE, 5), 16.0)
    with pytest.raises(BadClip, match="no such file"):
        inspect_clip(videos / "missing.mp4", None)
    (videos / "text.mp4.txt").write_text("no video")
    with pytest.raises(BadClip, match="cannot be opened"):
        inspect_clip(videos / "text.mp4.txt", None)


def test_lists_of_clips(videos, tmp_path):
    assert list_clips(videos)[0] == Clip(videos / "a.mp4", "a grey clip a", "a.mp4")
    (tmp_path / "list.csv").write_text('file,caption\nx/1.mp4,"one, two"\nx/2.mp4,\n')
    assert [(c.source, c.caption) for c in list_clips(tmp_path / "list.csv")] == [
        ("x/1.mp4", "one, two"),
        ("x/2.mp4", None),
    ]
    lines = [{"video": "1.mp4", "text": " one "}, {"path": "2.mp4"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = list_clips(tmp_path / "list.jsonl")
    assert found == [Clip(tmp_path / "1.mp4", "one", "1.mp4"), Clip(tmp_path / "2.mp4", None, "2.mp4")]
    (tmp_path / "bad.jsonl").write_text('{"caption": "no file"}\n')
    with pytest.raises(T3Error, match="bad.jsonl, entry 1, names no file"):
        list_clips(tmp_path / "bad.jsonl")
    (tmp_path / "worse.jsonl").write_text("{\n")
    with pytest.raises(T3Error, match="broken JSON"):
        list_clips(tmp_path / "worse.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(T3Error, match="holds no clip"):
        list_clips(tmp_path / "empty")


def test_buckets():
    sizes, lengths = [(480, 832), (832, 480), (240, 416)], [21, 81]
    assert vars(choose(1080, 1920, 100, sizes, lengths, False)) == {"height": 480, "width": 832, "frames": 81}
    assert vars(choose(1920, 1080, 80, sizes, lengths, False)) == {"height": 832, "width": 480, "frames": 21}
    assert choose(400, 700, 81, sizes, lengths, False).height == 240
    assert choose(100, 170, 81, sizes, lengths, True).height == 480
    with pytest.raises(NoBucket, match="100x170, smaller than 240x416"):
        choose(100, 170, 81, sizes, lengths, False)
    with pytest.raises(T3Error, match="HEIGHTxWIDTH"):
        parse_size("480")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "450x832"], "height is 450; this model needs a multiple of 16 pixels. Nearest: 448"),
        (["--frames", "80"], "Nearest: 81"),
        (["--own-samples", "prompts.txt"], "either a list of clips, or --own-samples"),
    ],
)
def test_illegal_buckets_are_refused_first(videos, model, tmp_path, capsys, arguments, said):
    status = main(["encode", str(videos), "--out", str(tmp_path / "set"), "--model", str(model), *arguments])
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_training_on_own_samples_with_clips_on_the_way(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue dot\na kite\n")
    own = ["encode", "--own-samples", str(prompts), "--model", str(model), "--out", str(tmp_path / "clips")]
    assert main([*own, "--size", "32x48", "--frames", "5", "--steps", "2", "--cfg", "1", "--text-tokens", "32"]) == 0
    shards = open_shards(tmp_path / "clips")
    assert [clip.facts.caption for clip in shards.clips] == ["a red square", "a blue dot", "a kite"]
    assert shards.clips[0].latents == (16, 2, 4, 6)
    AcceleratorState._reset_state(reset_partial_state=True)
    samples = {"prompts": ["a dot"], "height": 32, "width": 48, "frames": 5, "steps": 2, "cfg": 2.0, "every": 1}
    path = write_config(
        tmp_path,
        model={"source": str(model), "plan": "wan2.1-4k", "text_tokens": 32},
        schedule={"steps": 2},
        samples=samples,
        output={"png": True, "tensorboard": True},
    )
    assert main([path]) == 0
    written = sorted(
        file.relative_to(tmp_path / "run").as_posix() for file in (tmp_path / "run" / "samples").rglob("*.mp4")
    )
    assert written == ["samples/step-00000001/01-a dot.mp4", "samples/step-00000002/01-a dot.mp4"]
    with av.open(str(tmp_path / "run" / written[-1])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    boards = list((tmp_path / "run" / "tensorboard").glob("*"))
    assert boards or "tensorboard is not installed" in capsys.readouterr().err
    # And the result makes a clip where anyone would take it to.
    result = ["--t3-weights", str(tmp_path / "run" / "run.safetensors"), "--out", str(tmp_path / "clip.mp4"), "--json"]
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--cfg", "1", "--prompt", "a dot"]
    capsys.readouterr()
    assert generate(["--model", str(model), *result, *size]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "carried by the weights" in json.dumps(facts)
    assert (tmp_path / "clip.mp4").stat().st_size > 0
