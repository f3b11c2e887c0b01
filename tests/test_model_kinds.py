"""Every kind of Wan model the headless engine runs: small random ones, from the command line to the clip."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import build

from t3 import generate
from t3.errors import T3Error
from t3.latents import load_latents
from t3.pipeline import _load_transformers
from t3.plan import Grid, Plan
from t3.sources import find_sources

TINY = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "4", "--cfg", "2", "--prompt", "a kite"]
# Windows at these sizes, in both layers.
PLAN = Plan("small", Grid(2, 2, 3), ((1, 2, 3), ("each", 1, 1)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that builds a model of a kind once and gives its folder."""
    folder, built = tmp_path_factory.mktemp("models"), {}

    def get(kind):
        if kind not in built:
            built[kind] = build(kind, folder / kind)
        return built[kind]

    return get


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(PLAN.to_json(), encoding="utf-8")
    Image.effect_noise((200, 100), 60).convert("RGB").save("start.png")
    Image.effect_noise((100, 200), 60).convert("RGB").save("end.png")
    return tmp_path


def sample(capsys, model, *more):
    status = generate.main([*TINY, "--model", str(model), "--no-decode", "--latents-out", "l.latent", "--overwrite",
                            "--plan", "plan.json", "--json", *map(str, more)])  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 0, err
    return load_latents("l.latent")[0], json.loads(out)


@pytest.mark.parametrize(
    ("kind", "image", "grid"),
    [
        ("t2v", None, [2, 4, 6]),
        ("i2v", "start.png", [2, 4, 6]),
        ("a14b-t2v", None, [2, 4, 6]),
        ("a14b-i2v", "start.png", [2, 4, 6]),
        ("ti2v-5b", None, [2, 2, 3]),
        ("ti2v-5b", "start.png", [2, 2, 3]),
        ("vace", None, [2, 4, 6]),
        ("vace", "start.png", [2, 4, 6]),
        ("a14b-vace", None, [2, 4, 6]),
    ],
)
def test_from_prompt_to_clip(capsys, here, models, kind, image, grid):
    model = models(kind)
    images = ["--image", image] if image else []
    latents, result = sample(capsys, model, *images)
    assert result["grid"] == grid and result["ok"]
    assert latents.shape == (1, 48 if kind == "ti2v-5b" else 16, 2, *(2 * n for n in grid[1:]))
    dense, _ = sample(capsys, model, *images, "--plan", "dense")
    assert ((latents - dense).norm() / dense.norm()).item() > 1e-4  # T3 was in force
    status = generate.main([*TINY, "--model", str(model), "--out", "clip.mp4", "--steps", "1", *images])
    assert status == 0 and Path("clip.mp4").stat().st_size > 0


def test_the_image_is_where_the_clip_starts(capsys, here, models):
    """Wan2.2 5B keeps the image's latents as the first latent frame; another image gives another frame."""
    first, _ = sample(capsys, models("ti2v-5b"), "--image", "start.png")
    other, _ = sample(capsys, models("ti2v-5b"), "--image", "start.png", "--seed", 5)
    assert torch.allclose(first[:, :, 0], other[:, :, 0], atol=1e-5)
    assert not torch.allclose(first[:, :, 1], other[:, :, 1], atol=1e-2)
    different, _ = sample(capsys, models("ti2v-5b"), "--image", "end.png")
    assert not torch.allclose(first[:, :, 0], different[:, :, 0], atol=1e-2)


@pytest.mark.parametrize("kind", ["a14b-i2v", "vace"])
def test_a_last_image_is_used(capsys, here, models, kind):
    one, _ = sample(capsys, models(kind), "--image", "start.png")
    two, _ = sample(capsys, models(kind), "--image", "start.png", "--last-image", "end.png")
    assert (one - two).norm() > 1e-6 * one.norm()  # equal inputs give equal bits


def test_both_experts_sample_and_take_weights_of_their_own(capsys, here, models):
    """Of the released noise levels the first expert has those above the boundary, the second the rest."""
    folder = models("a14b-t2v")
    plain, _ = sample(capsys, folder)
    for i, part in enumerate(("transformer", "transformer_2")):
        shape = load_file(folder / part / "diffusion_pytorch_model.safetensors")["proj_out.bias"].shape
        save_file({"diffusion_model.head.head.diff_b": torch.full(shape, 0.5)}, f"bias{i}.safetensors")
        save_file({"diffusion_model.head.head.diff_b": torch.zeros(shape)}, "nothing.safetensors")
    high, _ = sample(capsys, folder, "--t3-weights", "bias0.safetensors", "--t3-weights", "nothing.safetensors")
    low, _ = sample(capsys, folder, "--t3-weights", "nothing.safetensors", "--t3-weights", "bias1.safetensors")
    both, _ = sample(capsys, folder, "--t3-weights", "bias0.safetensors")
    assert not torch.allclose(high, plain, atol=1e-3) and not torch.allclose(low, plain, atol=1e-3)
    assert not torch.allclose(high, low, atol=1e-3) and not torch.allclose(both, high, atol=1e-3)


def test_one_whole_model_is_not_put_in_the_place_of_both_experts(capsys, here, models):
    """Each is for its own noise: with one for all of it a clip is spoilt, and nothing looks wrong before."""
    folder = models("a14b-t2v")
    high, low = (str(folder / part) for part in ("transformer", "transformer_2"))
    arguments = [*TINY, "--model", str(folder), "--out", "clip.mp4", "--dry-run"]
    assert generate.main([*arguments, "--t3-weights", high]) == 2
    said = capsys.readouterr().err
    assert f"--t3-weights {high} is a whole model" in said and "give --t3-weights twice, high noise first" in said
    assert generate.main([*arguments, "--t3-weights", f"{high}:0"]) == 0
    assert generate.main([*arguments, "--t3-weights", high, "--t3-weights", low]) == 0


def test_two_files_are_the_experts_of_one_model(capsys, here, models):
    folder = models("a14b-t2v")
    files = [folder / part / "diffusion_pytorch_model.safetensors" for part in ("transformer", "transformer_2")]
    sources = find_sources(model=str(folder), dit=[str(f) for f in files])
    assert sources.experts == 2 and sources.boundary == 0.875
    from_folder, _ = sample(capsys, folder)
    from_files, _ = sample(capsys, folder, "--dit", files[0], "--dit", files[1])
    assert torch.equal(from_folder, from_files)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("i2v", [], "image-to-video model, and .* has no image. Name one: "),
        ("t2v", ["--image", "start.png"], "text-to-video model and takes no image"),
        ("ti2v-5b", ["--image", "start.png", "--last-image", "end.png"], "takes no last image"),
        ("ti2v-5b", ["--height", "80"], "height is 80.*multiple of 32.*Nearest: 64"),
        ("i2v", ["--image", "plan.json"], "plan.json cannot be read as an image"),
        ("i2v", ["--image", "none.png"], "none.png does not exist"),
        ("t2v", ["--t3-weights", "a", "--t3-weights", "b"], "2 --t3-weights files were given for 1"),
    ],
)
def test_what_a_model_cannot_do_is_said(capsys, here, models, kind, more, words):
    import re

    status = generate.main([*TINY, "--model", str(models(kind)), "--out", "clip.mp4", *more])
    err = capsys.readouterr().err
    assert status == 2 and re.search(words, err), err
    assert not Path("clip.mp4").exists()


def test_loras_of_two_experts_go_where_they_are_meant_to(capsys, here, models):
    """Most come in pairs, one for each expert."""
    name, folder, said = "blocks.0.attn1.to_q", models("a14b-t2v"), []
    width = len(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")[f"{name}.bias"])
    for file, amount in (("all", 1.0), ("high", 4.0), ("low", 40.0)):
        up, down = torch.zeros(width, 1), torch.zeros(1, width)
        up[0], down[0, 0] = amount, 1.0
        save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, f"{file}.safetensors")
    named = {"loras": ["all.safetensors"], "expert_loras": (["high.safetensors:0.5"], ["low.safetensors"])}
    sources = find_sources(model=str(folder), **named)
    plain = _load_transformers(find_sources(model=str(folder)), torch.float32, said.append)
    changed = _load_transformers(sources, torch.float32, said.append)
    weights = [dict(transformer.named_parameters())[f"{name}.weight"] for transformer in (*plain, *changed)]
    assert [(weights[i + 2] - weights[i])[0, 0].item() for i in range(2)] == pytest.approx([3.0, 41.0], abs=1e-5)
    assert said[0].startswith("all.safetensors goes to both experts; --lora-high")
    assert any("high.safetensors for the high-noise expert at 0.5" in line for line in sources.describe())
    alone = [
        find_sources(model=str(folder), expert_loras=loras)
        for loras in ((["low.safetensors"], []), ([], ["low.safetensors"]))
    ]
    assert alone[0].fingerprint() != alone[1].fingerprint()
    with pytest.raises(T3Error, match="--lora-low is for one of two experts, and t2v is one model: use --lora"):
        find_sources(model=str(models("t2v")), expert_loras=((), ["low.safetensors"]))


def test_a_clip_from_an_image_leaves_nothing_on_the_card_under_offload(capsys, here, models, monkeypatch):
    """5B: the pipeline that takes the image shares its parts with the one whose hooks move them, which is told."""
    told = []
    monkeypatch.setattr(WanPipeline, "maybe_free_model_hooks", lambda self: told.append(type(self).__name__))
    sample(capsys, models("ti2v-5b"), "--image", "start.png")
    assert told == ["WanPipeline"]


def test_the_vae_of_another_family_is_refused(capsys, here, models):
    vae = models("ti2v-5b") / "vae" / "diffusion_pytorch_model.safetensors"
    status = generate.main([*TINY, "--model", str(models("t2v")), "--vae", str(vae), "--out", "clip.mp4"])
    assert status == 2
    assert "latents of 16 channels and the VAE decodes 48" in capsys.readouterr().err


def test_fp8_storage_runs_and_is_near(capsys, here, models):
    """8-bit weights (three bits of mantissa) in bfloat16 arithmetic: near, not equal."""
    plain, _ = sample(capsys, models("t2v"), "--dtype", "bf16", "--device", "cpu")
    fp8, result = sample(capsys, models("t2v"), "--dtype", "fp8", "--device", "cpu")
    assert result["dtype"] == "fp8"
    assert 0 < ((fp8 - plain).norm() / plain.norm()).item() < 0.2
