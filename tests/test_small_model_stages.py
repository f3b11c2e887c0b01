"""The small model's stages, each at its smallest: text, folding, shards, a step of training, packing."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from t3.plan import Plan
from t3.retrofit.config import read_config
from t3.retrofit.output import write_full
from t3.retrofit.shards import open_shards, read_shards
from t3.sources import find_sources
from t3.weights import load_transformer
from tools.small_model import encode, export, init_dit, stage, train_text
from tools.small_model.captions import caption, words
from tools.small_model.clip_vae import ClipVae
from tools.small_model.evaluate import main as evaluate
from tools.small_model.fold_vae import fingerprint, fold, statistics
from tools.small_model.init_dit import TRANSFORMER, assemble, make_transformer
from tools.small_model.plans import GRID, PLANS
from tools.small_model.scenes import scenes
from tools.small_model.text import TOKENS, TextModel, make_encoder, make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with tokenizer, text encoder and VAE, all of random weights."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    make_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    AutoencoderKLWan(base_dim=4, z_dim=16).save_pretrained(folder / "vae")
    return folder


def test_tokenizer_round_trip(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts / "tokenizer", local_files_only=True)
    for text in [caption(scene) for scene in scenes("train", 0, 50)]:
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[:-1]).replace(" ,", ",") == text
    assert tokenizer("a shiny red square").input_ids.count(tokenizer.unk_token_id) == 1
    assert (
        tokenizer("A grey disc to the left of the violet box").input_ids
        == tokenizer("a gray circle left of a purple square").input_ids
    )
    assert len(tokenizer) == 3 + len(words())


def test_embeddings_are_those_of_the_pipeline(parts):
    model = TextModel(parts)
    captions = ["", *(caption(scene) for scene in scenes("train", 0, 4))]
    pipe = WanPipeline(model.tokenizer, model.encoder, vae=None, scheduler=None, transformer=None)
    padded = pipe._get_t5_prompt_embeds(captions, max_sequence_length=TOKENS, device=CPU, dtype=torch.float32)
    for ours, theirs in zip(model.embed(captions), padded, strict=True):
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=1e-4, atol=1e-4)
        assert theirs.shape == (512, 128) and not theirs[len(ours) :].any()


def test_text_training_learns_and_sees_nothing_held_out(monkeypatch):
    spoken, losses = [], []
    plain = train_text.spoken
    monkeypatch.setattr(train_text, "spoken", lambda said, rng: spoken.append(said) or plain(said, rng))
    monkeypatch.setattr(train_text, "say", lambda text: losses.append(float(text.split()[-1])))
    train_text.train(100, 4, CPU)
    # Guessing each attribute evenly is a loss of 14.5.
    assert losses[-1] < 12 and len(spoken) == 400
    assert not any(train_text.is_held(said) for said in spoken)


def test_folding_is_exact():
    torch.manual_seed(2)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16).double()
    # Channels of very different size and place, as training leaves them.
    vae.quant_conv.weight.data *= torch.logspace(-1, 1, 32, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    vae.quant_conv.bias.data = torch.linspace(-2, 2, 32, dtype=torch.float64)
    model = ClipVae(vae)
    video = torch.rand(1, 3, 5, 32, 40, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        mean, log_variance = model.encode(video)
        before = model.decode(mean)
        mine, spread = statistics(model, 2, 5, CPU, torch.float64, sizes=((56, 80),))
        fold(vae, mine, spread)
        folded, folded_variance = model.encode(video)
        after = model.decode(folded)
        new_mean, new_spread = statistics(model, 2, 5, CPU, torch.float64, sizes=((56, 80),))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    constants = [torch.tensor(getattr(vae.config, n), dtype=torch.float64) for n in ("latents_mean", "latents_std")]
    torch.testing.assert_close(new_mean, constants[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(new_spread, constants[1], rtol=1e-8, atol=1e-8)
    scale = (constants[1] / spread).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(folded_variance, log_variance + 2 * scale.log(), rtol=1e-9, atol=1e-9)
    assert fingerprint(vae) != fingerprint(AutoencoderKLWan(base_dim=4, z_dim=16))


@pytest.fixture(scope="module")
def shards(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "low"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encode.SIZES, "low", (56, 80))
        for frames, start, clips in (("5:0.8,1:0.2", 0, 8), ("5", 100, 3)):
            target = folder if frames != "5" else folder.with_name("test")
            asked = {"model": parts, "out": target, "size": "low", "frames": frames, "batch": 4, "start": start}
            asked |= {"clips": clips, "device": "cpu", "split": "train"}
            encode.main([text for key, value in asked.items() for text in (f"--{key}", str(value))])
    return folder


def test_shards_hold_captions_latents_and_text(parts, shards):
    opened = open_shards(shards)
    found = {clip.facts.source: clip for clip in read_shards(shards)}
    assert set(found) == {f"train/{i}" for i in range(8)}
    assert {clip.latents.shape for clip in found.values()} == {(16, 2, 7, 10), (16, 1, 7, 10)}
    for source, clip in found.items():
        scene = scenes("train", int(source.split("/")[1]), 1)[0]
        assert clip.facts.caption == caption(scene, clip.facts.frames)
        expected = TextModel(parts).embed([clip.facts.caption])[0]
        torch.testing.assert_close(clip.text.float(), expected, rtol=2**-7, atol=1e-2)  # bfloat16 keeps 8 bits
    assert opened.empty_text().shape == (1, 128)
    assert opened.index["encoded"]["vae"] == fingerprint(AutoencoderKLWan.from_pretrained(parts / "vae"))


def test_latents_are_normalised_as_hosts_do(parts):
    vae = AutoencoderKLWan.from_pretrained(parts / "vae")
    video = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    mean = vae.encode(video).latent_dist.mode()
    spread, offset = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_std, vae.config.latents_mean))
    ours = encode.latents_of(ClipVae(vae), video, torch.float32)
    torch.testing.assert_close(ours, (mean - offset) / spread, rtol=1e-3, atol=1e-3)


def test_a_few_steps_of_flow_matching_lower_the_loss(shards):
    clips = [clip for clip in read_shards(shards) if clip.facts.frames == 5]
    latents = torch.stack([clip.latents.float() for clip in clips])[..., :6, :]
    text = torch.stack([torch.nn.functional.pad(clip.text.float(), (0, 0, 0, 32 - len(clip.text))) for clip in clips])
    transformer = make_transformer(num_layers=2).train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    torch.manual_seed(0)
    noise, sigma = torch.randn_like(latents), torch.linspace(0.2, 0.9, len(latents))
    mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    losses = []
    for _ in range(12):
        velocity = transformer(mixed, sigma * 1000, text, return_dict=False)[0]
        loss = (velocity - (noise - latents)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_transformer_starts_the_same_everywhere_and_silent():
    one, other = make_transformer(3, num_layers=1), make_transformer(3, num_layers=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    out = one(torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 128), return_dict=False)[0]
    assert not out.any()


def test_packed_pipeline_fits_its_limits_and_carries_the_plan(parts, tmp_path):
    torch.manual_seed(0)
    packed = tmp_path / "packed"
    AutoencoderKLWan(base_dim=12, z_dim=16).save_pretrained(tmp_path / "vae")
    transformer = make_transformer()
    dit = tmp_path / "tuned.safetensors"
    plan = PLANS["small-frame"]
    write_full(dit, transformer.state_dict(), dict(transformer.config), plan, GRID, "float16")
    frozen = ["--vae", str(tmp_path), "--text", str(parts)]
    export.main([*frozen, "--dit", str(dit), "--out", str(packed)])
    found = export.sizes(packed)
    assert max(found.values()) < 16_000_000 and sum(found.values()) < 24_000_000
    assert found["transformer/diffusion_pytorch_model.safetensors"] > 15_000_000
    sources = find_sources(model=str(packed))
    assert Plan.from_json(sources.plan_json) == plan and sources.transformer["text_dim"] == 128
    loaded = load_transformer(packed / "transformer", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, transformer.state_dict()[name].float(), rtol=2**-10, atol=1e-6)
    assert "Plan: small-frame" in (packed / "README.md").read_text()
    with open(packed / "transformer" / "config.json") as file:
        config = json.load(file)
    assert {key: config[key] for key in ("num_layers", "ffn_dim")} == {"num_layers": 10, "ffn_dim": 384}
    (packed / "more.bin").write_bytes(bytes(16_000_001))
    with pytest.raises(SystemExit, match=r"more\.bin is 16,000,001"):
        export.sizes(packed)


def test_evaluation_samples_decodes_and_judges(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(encode.SIZES, "low", (112, 160))
    assemble(parts, parts, make_transformer(num_layers=1), tmp_path / "model", torch.float32)
    out = tmp_path / "result.json"
    asked = {"model": tmp_path / "model", "out": out, "pictures": tmp_path / "sheet.png", "plan": "dense"}
    asked |= {"size": "low", "frames": 5, "steps": 2, "prompts": 3, "batch": 2, "device": "cpu"}
    evaluate([text for key, value in asked.items() for text in (f"--{key}", str(value))])
    result = json.loads(out.read_text())
    assert len(result["clips"]) == 3 and 0 <= result["summary"]["all"] <= 100
    assert (tmp_path / "sheet.png").exists()


def test_plans_are_legal_and_each_step_is_severer():
    sizes = []
    for plan in PLANS.values():
        partitions = plan.partitions(GRID, 10)
        assert partitions[0] == (6, 1, 1) and all(not p.coincides(GRID) for p in partitions[1:5])
        sizes.append(max(size for p in partitions[1:5] for _, size in p.window_classes(GRID)))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("name", ["dense-image", "dense-low", "dense-high", "retrofit", "control"])
def test_recipes_are_configs(name, pytestconfig):
    config = read_config(pytestconfig.rootpath / "tools" / "small_model" / "recipes" / f"{name}.toml")
    assert config.model.text_tokens == TOKENS and config.output.folder.endswith(name)
    assert config.stages[0].max_seconds <= 480
    assert TRANSFORMER["text_dim"] == 128


STAGES = """
[sets.few]
size = "low"
frames = "5"
batch = 4
clips = 8
start = 10

[sets.few-test]
split = "test"
size = "low"
frames = "5"
clips = 2

[stages.few]
recipe = "few.toml"
sets = ["few", "few-test"]
reserve = 1
evaluate = { size = "low", frames = 5, prompts = 2, batch = 2, steps = 1 }
"""
RECIPE = """
[model]
source = "small/model"
plan = "dense"
text_tokens = 32
[[data.sets]]
name = "few"
folder = "small/data/few"
[data]
validation = ["small/data/few-test"]
[train]
batch = 4
device = "cpu"
[[stages]]
steps = 1
[validation]
clips = 1
levels = 2
draws = 1
[output]
folder = "small/dense-few"
dtype = "float16"
tensorboard = false
"""


def test_a_stage_encodes_trains_measures_and_keeps(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(encode.SIZES, "low", (112, 160))
    for name, pieces in (("text", ("tokenizer", "text_encoder")), ("folded", ("vae",))):
        for piece in pieces:
            shutil.copytree(parts / piece, tmp_path / "small" / name / piece)
    monkeypatch.setattr(init_dit, "make_transformer", partial(make_transformer, num_layers=1))
    (tmp_path / "stages.toml").write_text(STAGES)
    (tmp_path / "few.toml").write_text(RECIPE)
    common = ["few", "--stages", "stages.toml", "--root", "small", "--keep", "kept", "--device", "cpu"]
    stage.main([*common, "--fresh", "100"])
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {
        *(f"dense-few{end}" for end in (".safetensors", ".txt", ".json", ".png")),
        *(f"dense-few-{table}.csv" for table in ("metrics", "validation")),
    }
    assert {clip.facts.source for clip in read_shards(tmp_path / "small/data/few")} == {
        f"train/{i}" for i in range(110, 118)
    }
    judged = json.loads((tmp_path / "kept/dense-few.json").read_text())
    assert len(judged["clips"]) == 2 and "colour" in judged["summary"]
    # On from there, under another name; what is encoded stays.
    stage.main([*common, "--start", "kept/dense-few.safetensors", "--name", "dense-more", "--set", "stages.1.steps=2"])
    assert (tmp_path / "kept/dense-more.safetensors").exists()
    few, more = (load_file(tmp_path / f"kept/dense-{name}.safetensors") for name in ("few", "more"))
    assert few.keys() == more.keys() and any(not torch.equal(few[name], more[name]) for name in few)
    # Tuned to windows: with them it is judged too.
    capsys.readouterr()
    windows = "model.plan='small/plans/small-frame.json'"
    stage.main([*common, "--start", "kept/dense-few.safetensors", "--name", "t3-few", "--set", windows])
    assert "plan 'small-frame', carried by the weights" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no stage 'fewer'. There are few"):
        stage.main(["fewer", *common[1:]])
    with pytest.raises(SystemExit, match="s are left for training"):
        stage.main([*common, "--name", "late", "--seconds", "30"])
    with pytest.raises(SystemExit, match="ended with 2; its output is in"):
        stage.main([*common, "--set", "model.plan='nowhere.json'"])


def test_processes_share_a_stage(parts, tmp_path, monkeypatch):
    """Two encode a half each and train together; the scenes are those that one would have encoded."""
    monkeypatch.chdir(tmp_path)
    for name, pieces in (("text", ("tokenizer", "text_encoder")), ("folded", ("vae",))):
        for piece in pieces:
            shutil.copytree(parts / piece, tmp_path / "small" / name / piece)
    monkeypatch.setattr(init_dit, "make_transformer", partial(make_transformer, num_layers=1))
    (tmp_path / "stages.toml").write_text(STAGES.replace("frames = 5, prompts", "frames = 1, prompts"))
    (tmp_path / "few.toml").write_text(RECIPE)
    where = ["--stages", "stages.toml", "--root", "small", "--keep", "kept"]
    stage.main(["few", *where, "--device", "cpu", "--cards", "2"])
    data = tmp_path / "small/data/few"
    assert [clip.facts.source for clip in read_shards(data)] == [f"train/{i}" for i in range(10, 18)]
    assert not list(data.parent.glob("*.part-*"))
    last = (tmp_path / "kept/dense-few-metrics.csv").read_text().splitlines()
    assert dict(zip(last[0].split(","), last[-1].split(","), strict=True))["clips"] == "8"  # 4 a process, one step
    with pytest.raises(SystemExit, match="an encode of 2 ended with"):
        stage.encode_parts([["--model", "nowhere", "--out", f"part-{i}"] for i in range(2)])


def test_processes_keep_to_the_cards_that_may_be_used(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, sys\nif 'tools.small_model.encode' in sys.orig_argv:\n"
        f"    pathlib.Path({str(tmp_path)!r}, os.environ['CUDA_VISIBLE_DEVICES']).touch()\n    os._exit(0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    stage.encode_parts([["--out", "a"], ["--out", "b"]])
    assert (tmp_path / "5").exists() and (tmp_path / "3").exists()
