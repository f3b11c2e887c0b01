"""`python -m t3.generate` and `t3.decode` from the command line to the files, on a small model of random weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from generate_runs import TINY, files, frames_of, run
from safetensors.torch import load_file, save_file
from small_models import build_like_embedded

from t3 import decode, embedded, generate, jobs, pipeline
from t3.latents import load_latents

ROOT = Path(__file__).resolve().parent.parent
HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def model(tiny_model):
    """Arguments for a clip of this size by the small model, all but the prompt."""
    return [*TINY, "--model", str(tiny_model)]


@pytest.fixture
def tiny(model):
    """The same with a prompt."""
    return [*model, "--prompt", "a red square moving left"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a space and a letter outside ASCII in its name, as the working directory."""
    folder = tmp_path / "my clips ü"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_model_and_a_prompt_make_a_playable_clip(capsys, here, tiny):
    status, result, _ = run(capsys, *tiny, "--json")
    assert status == 0
    assert files(here) == ["output", "output/t3-00001.mp4"]
    assert frames_of("output/t3-00001.mp4").shape == (5, 64, 96, 3)
    assert result["ok"] and result["clips"][0]["status"] == "done"
    assert result["grid"] == [2, 4, 6] and result["plan"]["name"] == "wan2.1-4k"
    assert result["tuned"] == "cannot tell"
    split = result["split"]
    assert (split["mode"], split["ranks"], split["tokens_per_rank"]) == ("single process", 1, [48])
    assert set(result["seconds"]) == {"load", "sample", "decode"}
    assert result["peak_memory_bytes"]["host"] > 0
    assert result["backend"]["name"] in result["backend"]["why"]
    status, _, _ = run(capsys, *tiny)
    assert status == 0
    assert files(here)[1:] == ["output/t3-00001.mp4", "output/t3-00002.mp4"]


def test_without_a_model_the_embedded_one_runs_by_its_own_plan(capsys, here, monkeypatch):
    """Prompt, guidance, steps and the rate of frames are the embedded model's own; a package without one says so."""
    monkeypatch.setattr(embedded, "__file__", str(here / "embedded.py"))
    status, _, err = run(capsys, "--out", "clip.mp4")
    assert status == 2 and "install T3 again, or name a model" in err
    build_like_embedded(here / "model")
    status, result, err = run(capsys, *TINY[:6], "--steps", 1, "--json")
    assert status == 0 and "No model was named" in err
    assert result["model"]["name"] == "embedded" and result["model"]["parameters"] == 7_925_312
    assert (result["tuned"], result["plan"]["name"]) == ("yes", "small-frame")
    assert result["plan"]["reason"] == "carried by the weights" and result["forward_passes"] == 2
    assert result["clips"][0]["prompt"] == generate.EMBEDDED_PROMPT
    with av.open("output/t3-00001.mp4") as container:
        assert container.streams.video[0].average_rate == generate.EMBEDDED_DEFAULTS["fps"]


def test_the_same_seed_gives_the_same_latents_bit_for_bit(capsys, here, tiny):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        status, _, _ = run(capsys, *tiny, "--seed", seed, "--no-decode", "--latents-out", f"{name}.latent")
        assert status == 0
    a, b, c = (load_latents(f"{name}.latent")[0] for name in "abc")
    assert a.shape == (1, 16, 2, 8, 12)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_backends_chunks_and_batches_agree(tiny_model):
    """Two steps of a float32 model whose kernels round differently: relative error below 1e-4."""
    from t3.pipeline import Engine
    from t3.plan import Grid, Plan
    from t3.sources import find_sources

    plan = Plan("small windows", Grid(2, 4, 6), (("each", 1, 1), (1, 2, 3), (2, 2, 2)))
    clips = [jobs.Clip(f"prompt {i}", "", 64, 96, 5, 2, 3.0, i) for i in range(2)]
    grid = Grid(2, 4, 6)

    def sample(batch, **options):
        engine = Engine.load(
            find_sources(model=str(tiny_model)), plan, jobs.Options(**options), grid, lambda text: None
        )
        return engine.sample_batch(clips) if batch else torch.cat([engine.sample(clip) for clip in clips])

    plain = sample(False)
    assert torch.equal(sample(False, attention_memory=150_000), plain)
    for other in (sample(True), sample(False, backend="sdpa-math")):
        assert ((other - plain).norm() / plain.norm()).item() < 1e-4


def test_kept_latents_decode_to_the_same_clip(capsys, here, tiny, tiny_model):
    tall = [*tiny, "--height", 96]
    arguments = [*tall, "--out", "clip.mkv", "--latents-out", "keep.latent", "--crop", 72, "--bit-depth", 10]
    status, _, _ = run(capsys, *arguments, "--codec", "h265", "--fps", 12, "--crf", 0)
    assert status == 0
    vae = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    for out, source in (("a.mkv", vae), ("b.mkv", tiny_model), ("c.mkv", tiny_model / "vae")):
        again = ["keep.latent", "--vae", source, "--out", out, "--codec", "h265", "--bit-depth", 10]
        status, result, _ = run(capsys, *again, "--crop", 72, "--crf", 0, "--json", main=decode.main)
        assert status == 0 and result["frames"] == 5 and result["size"] == [72, 96]
        with av.open(out) as container:
            assert container.streams.video[0].average_rate == 12  # the latents remember the rate
        assert np.array_equal(frames_of(out), frames_of("clip.mkv"))
    assert frames_of("clip.mkv").shape == (5, 72, 96, 3)


def test_png_frames(capsys, here, tiny):
    status, _, _ = run(capsys, *tiny, "--out", "shots/", "--bit-depth", 16)
    assert status == 0
    assert [name for name in files(here) if name.endswith(".png")] == [f"shots/frame_{i:05}.png" for i in range(5)]


def test_a_prompt_file_is_shared_out_and_resumed(capsys, here, model):
    (here / "prompts.json").write_text(
        json.dumps([{"data_file": f"vids/{n}.mp4", "prompt_en": n} for n in ("one", "two", "three")]), encoding="utf-8"
    )
    arguments = [*model, "--prompts", "prompts.json", "--out", "clips", "--json"]
    status, result, _ = run(capsys, *arguments, "--shard", "1/2")
    assert status == 0 and [clip["name"] for clip in result["clips"]] == ["two"]
    before = (here / "clips/two.mp4").read_bytes()
    status, result, _ = run(capsys, *arguments)
    assert status == 0 and result["already_done"] == 1
    assert [clip["name"] for clip in result["clips"]] == ["one", "three"]
    assert (here / "clips/two.mp4").read_bytes() == before
    status, result, _ = run(capsys, *arguments)
    assert status == 0 and result["already_done"] == 3 and result["clips"] == []


def test_original_format_files_make_the_same_clip(capsys, here, tiny_model):
    """The model written with the original names, as single files, gives the same latents."""
    from t3.weights.layout_dit import dit_layout
    from t3.weights.layout_vae import vae_layout

    for part, layout in (("transformer", dit_layout), ("vae", vae_layout)):
        config = json.loads((tiny_model / part / "config.json").read_text())
        tensors = load_file(tiny_model / part / "diffusion_pytorch_model.safetensors")
        save_file({name: tensors[p.name] for name, p in layout(config).items()}, f"{part}.safetensors")
    text = tiny_model / "text_encoder" / "model.safetensors"
    files = ["--dit", "transformer.safetensors", "--vae", "vae.safetensors", "--text-encoder", text]
    files += ["--tokenizer", tiny_model / "tokenizer"]
    arguments = [*TINY, "--prompt", "a red square moving left", "--no-decode", "--latents-out"]
    assert run(capsys, *arguments, "files.latent", *files)[0] == 0
    assert run(capsys, *arguments, "folder.latent", "--model", tiny_model)[0] == 0
    assert torch.equal(load_latents("files.latent")[0], load_latents("folder.latent")[0])


def test_t3_weights_bring_their_plan_and_change_the_clip(capsys, here, tiny):
    from t3 import Grid, Plan

    plan = Plan("tuned for this", Grid(2, 4, 6), ((1, 2, 2),))
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) / 16
    save_file({"blocks.0.self_attn.q.diff": weight}, "tuned.safetensors", metadata={"t3.plan": plan.to_json()})
    arguments = [*tiny, "--no-decode", "--json", "--latents-out"]
    _, plain, _ = run(capsys, *arguments, "plain.latent")
    status, tuned, err = run(capsys, *arguments, "tuned.latent", "--t3-weights", "tuned.safetensors")
    assert status == 0
    assert plain["tuned"] == "cannot tell" and tuned["tuned"] == "yes"
    assert tuned["plan"]["name"] == "tuned for this" and tuned["plan"]["reason"] == "carried by the weights"
    assert "tuned.safetensors" in err
    assert not torch.equal(load_latents("plain.latent")[0], load_latents("tuned.latent")[0])


def python(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        **options,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--dry-run", "--model", HUB, "--prompt", "x"],
        ["--dry-run", "--json", "--model", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "--prompt", "x"],
        ["--dry-run", "--model", HUB, "--prompt", "x", "--frames", "80"],
    ],
)
def test_help_dry_run_and_refusals_load_no_torch(tmp_path, arguments):
    code = (
        "import sys; from t3.generate import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'av', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", code, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "Nearest: 81" in done.stderr


def test_a_dry_run_says_what_a_run_would_do(capsys, here):
    model = ["--model", HUB, "--prompt", "x"]
    status, facts, _ = run(capsys, *model, "--dry-run", "--json")
    assert status == 0 and facts["dry_run"]
    assert facts["grid"] == [21, 136, 240] and facts["tokens"] == 685_440
    assert [layer["partition"] for layer in facts["layers"]][1] == [1, 17, 30]
    assert [layer["branches"] for layer in facts["layers"]] == [1, 2, 2, 2, 2]
    assert round(facts["macs"]["attention_t3"] / 1e12) == 594
    assert facts["forward_passes"] == 100
    assert facts["tuned"] == "cannot tell"
    assert facts["model"]["parameters"] == 1_418_996_800
    generate.main([*model, "--dry-run"])
    text = capsys.readouterr().out
    assert "to be downloaded" in text and "gives noise" in text
    assert "21 x 136 x 240 = 685,440 tokens" in text
    generate.main([*model, "--dry-run", "--plan", "dense"])
    assert "gives noise" not in capsys.readouterr().out
    assert files(here) == ["output"] or files(here) == []


BAD = {
    "frames not 4n+1": (["--frames", "80"], "frames is 80.*Nearest: 81"),
    "height no multiple of the patch": (["--height", "100"], "height is 100.*multiple of 16.*Nearest: 96"),
    "unknown plan": (["--plan", "wan3"], "unknown plan 'wan3'.*wan2.1-4k"),
    "missing plan file": (["--plan", "no.json"], "no.json cannot be used"),
    "broken plan": (["--plan", "broken.json"], "broken.json.*not JSON.*line 1"),
    "truncated weights": (["--t3-weights", "truncated.safetensors"], "truncated.safetensors"),
    "a pickle": (["--t3-weights", "pickle.safetensors"], "pickle"),
    "a pickle by name": (["--dit", "model.pth", "--vae", "x", "--text-encoder", "x"], "model.pth"),
    "a web page": (["--lora", "page.safetensors"], "page.safetensors"),
    "missing weights": (["--lora", "none.safetensors:0.5"], "none.safetensors: no such file"),
    "a LoRA of another width": (["--lora", "wide.safetensors"], "3072.*256"),
    "a VAE as DiT": (["--dit", "VAE", "--vae", "VAE", "--text-encoder", "VAE"], "vae"),
    "files missing beside a DiT": (["--dit", "VAE"], "--vae and --text-encoder must be given"),
    "existing output": (["--out", "taken.mp4"], "taken.mp4 exists already"),
    "unwritable output": (["--out", "taken.mp4/clip.mp4"], "cannot be written|cannot be an output"),
    "unknown kind of output": (["--out", "clip.avi"], "clip.avi.*mp4"),
    "empty prompt file": (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
    "broken prompt file": (["--prompts", "broken.json"], "broken.json"),
    "missing prompt file": (["--prompts", "none.txt"], "none.txt does not exist"),
    "prompt and prompts": (["--prompt", "x", "--prompts", "empty.txt"], "not both"),
    "share without prompts": (["--shard", "0/2"], "--shard"),
    "share out of range": (["--prompts", "good.txt", "--shard", "2/2"], "share 2 of 2.*Use 1"),
    "no steps": (["--steps", "0"], "--steps is 0"),
    "two ways to save memory": (["--memory", "lean", "--attention-memory", "2"], "leave --memory lean out"),
    "cfg below 1": (["--cfg", "0.5"], "--cfg is 0.5"),
    "cfg that is no number": (["--cfg", "nan"], "--cfg is nan"),
    "cfg without end": (["--cfg", "inf"], "--cfg is inf"),
    "shift without end": (["--shift", "inf"], "--shift is inf"),
    "memory that is no number": (["--attention-memory", "nan"], "--attention-memory is nan"),
    "negative seed": (["--seed", "-1"], "--seed is -1"),
    "seed too large": (["--seed", str(2**64)], "use 0 to 2\\^64 - 1"),
    "empty prompt": (["--prompt", " "], "--prompt is empty"),
    "a file for the clips of many prompts": (
        ["--prompts", "good.txt", "--out", "new.mkv"],
        "Name a folder, such as new ",
    ),
    "a file for the latents of many prompts": (
        ["--prompts", "good.txt", "--no-decode", "--latents-out", "new.latent"],
        "Name a folder, such as new[.]",
    ),
    "no frame rate": (["--fps", "0"], "frame rate of 0"),
    "crop too large": (["--crop", "400"], "cannot be cropped to 400"),
    "odd size for video": (["--crop", "47"], "47"),
    "codec of PNG": (["--out", "shots/", "--codec", "h264"], "PNG"),
    "image for a text model": (["--image", "page.safetensors"], "takes no image"),
    "missing image": (["--image", "none.png"], "takes no image"),
    "unknown backend": (["--backend", "fastest"], "unknown attention backend 'fastest'"),
    "backend for a GPU": (["--backend", "sage", "--device", "cpu"], "'sage' cannot be used"),
    "no such device": (["--device", "cuda:99"], "cuda:99 cannot be used"),
    "a device without numbers": (["--device", "meta"], "meta cannot be used"),
    "no such model": (["--model", "no/such/folder", "--prompt", "x"], "no such folder"),
    "unknown hub id": (["--model", "some/model", "--prompt", "x"], "not in the local cache"),
    "nothing to write": (["--no-decode"], "--latents-out"),
    "nothing to show": (["--model", HUB], "give --prompt"),
    "not a number": (["--steps", "many"], "invalid int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_made(capsys, here, model, tiny_model, case):
    arguments, words = BAD[case]
    (here / "broken.json").write_text("{", encoding="utf-8")
    (here / "empty.txt").write_text("\n# nothing\n", encoding="utf-8")
    (here / "good.txt").write_text("one\n", encoding="utf-8")
    (here / "taken.mp4").write_text("mine", encoding="utf-8")
    (here / "page.safetensors").write_text("<!DOCTYPE html><html></html>" * 10, encoding="utf-8")
    vae = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    (here / "truncated.safetensors").write_bytes(vae.read_bytes()[:5000])
    torch.save({"a": torch.zeros(3)}, "pickle.safetensors")
    torch.save({"a": torch.zeros(3)}, "model.pth")
    save_file(
        {
            "blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 3072),
            "blocks.0.self_attn.q.lora_B.weight": torch.zeros(3072, 4),
        },
        "wide.safetensors",
    )
    before = {name: (here / name).read_bytes() for name in files(here)}
    arguments = [str(vae) if a == "VAE" else a for a in arguments]
    said = {"--prompt", "--prompts"} & set(arguments) or case == "nothing to show"
    base = TINY if case == "files missing beside a DiT" else model
    status, result, err = run(capsys, *base, *([] if said else ["--prompt", "x"]), "--json", *arguments)
    assert status == 2
    import re

    assert re.search(words, err, re.DOTALL), err
    assert "Traceback" not in err
    assert result is None or (result["ok"] is False and result["status"] == 2)
    after = [name for name in files(here) if name != "output"]  # the folder's writability is tried
    assert {name: (here / name).read_bytes() for name in after} == before


def test_a_disk_without_room_for_the_latents_is_told_before_sampling(capsys, here, tiny, monkeypatch):
    """16 channels of 2 x 8 x 12 in float32 are 12,288 bytes: those of a clip, or of all where they are kept."""
    (here / "two.txt").write_text("one\ntwo\n", encoding="utf-8")
    many = [*tiny[:-2], "--prompts", "two.txt"]

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, free))

    monkeypatch.setattr(pipeline.Engine, "load", lambda *_: pytest.fail("a model was loaded"))
    for arguments, needed in ((tiny, 12_288), (many, 12_288), ([*many, "--latents-out", "kept"], 2 * 12_288)):
        disk(needed - 1)
        status, _, err = run(capsys, *arguments)
        assert status == 2 and f"needs about {needed / 1024:.1f} KiB" in err
        disk(needed)
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            run(capsys, *arguments)


def broken_model(model, folder, part, change):
    """A copy of a model with one tensor changed."""
    shutil.copytree(model, folder)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_sampling_that_gives_no_numbers_fails_and_the_others_go_on(capsys, here, tiny_model):
    def spoil(tensors):
        tensors["proj_out.bias"][:] = float("nan")

    model = broken_model(tiny_model, here / "broken", "transformer", spoil)
    (here / "two.txt").write_text("one\ntwo\n", encoding="utf-8")
    status, result, err = run(capsys, *TINY, "--model", model, "--prompts", "two.txt", "--out", "clips", "--json")
    assert status == 1
    assert [clip["status"] for clip in result["clips"]] == ["failed", "failed"]
    assert "not numbers" in result["clips"][0]["error"] and "--dtype bf16" in err
    assert not list((here / "clips").iterdir())


def test_a_damaged_folder_is_named(capsys, here, tiny_model):
    shutil.copytree(tiny_model, here / "m")
    (here / "m" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    status, _, err = run(capsys, *TINY, "--model", here / "m", "--prompt", "x", "--out", "a.mp4")
    assert status == 2 and "cannot be loaded" in err
    shutil.rmtree(here / "m" / "vae")
    status, _, err = run(capsys, *TINY, "--model", here / "m", "--prompt", "x", "--out", "a.mp4")
    assert status == 2 and "config.json is missing" in err
    assert not (here / "a.mp4").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_file_and_says_so(tmp_path, tiny, kind):
    command = [sys.executable, "-m", "t3.generate", *tiny, "--steps", "5000", "--out", "clip.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = ""
    deadline = time.monotonic() + 300
    while "sampling" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(kind)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, seen + rest
    assert "interrupted" in rest and "Traceback" not in rest
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.latent"], "none.latent does not exist"),
        (["nan.latent"], "NaN|not finite|numbers"),
        (["wide.latent"], "48 channels and this VAE decodes 16|48"),
        (["good.latent", "--out", "clip.avi"], "clip.avi"),
        (["good.latent", "--crop", "999"], "cannot be cropped to 999"),
        (["good.latent", "--vae", "none"], "none: no such file"),
        (["good.latent", "--vae", "TRANSFORMER"], "dit"),
    ],
)
def test_bad_latents_are_named(capsys, here, tiny_model, arguments, words):
    import re

    version = {"latent_format_version_0": torch.empty(0)}
    good = torch.randn(1, 16, 2, 8, 12)
    bad = good.clone()
    bad[0, 0, 0, 0, 0] = float("nan")
    for name, tensor in (("good", good), ("nan", bad), ("wide", torch.randn(1, 48, 2, 8, 12))):
        save_file({"latent_tensor": tensor, **version}, f"{name}.latent")
    before = files(here)
    transformer = tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"
    arguments = [str(transformer) if a == "TRANSFORMER" else a for a in arguments]
    status, _, err = run(capsys, "--vae", tiny_model, "--out", "clip.mp4", *arguments, main=decode.main)
    assert status == 2
    assert re.search(words, err), err
    assert files(here) == before


def test_everything_runs_without_triton(tmp_path, tiny):
    """Triton is neither needed nor imported: blocked, the whole way from prompt to file works."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # what Python itself takes for "not installed"
        "from t3.generate import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = python("-c", code, *tiny, "--out", "clip.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert frames_of(tmp_path / "clip.mp4").shape == (5, 64, 96, 3)


def test_compile_without_triton_is_told_and_left_out(monkeypatch):
    monkeypatch.setattr(pipeline, "installed", lambda package: package != "triton")
    said = []
    assert not pipeline.can_compile(torch.device("cuda"), said.append)
    assert len(said) == 1 and "Triton" in said[0]
    assert pipeline.can_compile(torch.device("cpu"), said.append)
    assert len(said) == 1
