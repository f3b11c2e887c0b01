"""VACE headless: its control blocks under the plan, what it is given, its file, and what it costs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanVACETransformer3DModel
from PIL import Image
from small_models import build
from test_processor import PLAN, SMALL, expected_attention, inputs, run

from t3 import convert, encoder, generate
from t3.cost import ModelShape, model_cost
from t3.jobs import Clip, Options
from t3.latents import load_latents
from t3.plan import Grid, Plan
from t3.processor import install_t3
from t3.sources import find_sources
from t3.vace import frame_mask, kept_frames

JOINS = [0, 2, 3]


def transformer():
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(**SMALL, in_channels=16, out_channels=16, vace_layers=JOINS)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def with_control(grid, batch):
    t, h, w = grid
    control = torch.randn(batch, 96, t, 2 * h, 2 * w, generator=torch.Generator().manual_seed(5))
    return inputs(grid, batch, control_hidden_states=control)


@pytest.mark.parametrize(("grid", "batch"), [((2, 8, 12), 1), ((3, 5, 7), 2)])
def test_a_control_block_has_the_windows_of_the_layer_it_joins(grid, batch):
    model, seen = transformer(), []
    install_t3(model, PLAN)

    def record(attn, args, output):
        seen.append((attn, args[0], args[3], output))

    for block in (*model.vace_blocks, *model.blocks):
        block.attn1.register_forward_hook(record)
    run(model, with_control(grid, batch))
    assert [attn for attn, *_ in seen] == [block.attn1 for block in (*model.vace_blocks, *model.blocks)]
    for layer, (attn, hidden, rotary, output) in zip([*JOINS, *range(5)], seen, strict=True):
        expected = expected_attention(attn, hidden, rotary, grid, PLAN.partition(layer, grid))
        assert ((output.double() - expected).norm() / expected.norm()).item() < 2e-6


def test_removed_and_dense():
    model, arguments = transformer(), with_control((2, 8, 12), 1)
    dense = run(model, arguments)
    installed = install_t3(model, PLAN)
    assert ((run(model, arguments) - dense).norm() / dense.norm()).item() > 1e-3
    installed.remove()
    assert torch.equal(run(model, arguments), dense)
    install_t3(model, Plan.preset("dense"), backend="sdpa")
    assert torch.equal(run(model, arguments), dense)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("vace", tmp_path_factory.mktemp("vace") / "model")


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("start.png", "end.png"):
        Image.effect_noise((90, 70), 60).convert("RGB").save(name)
    return Path("start.png"), Path("end.png")


def clip(**changes):
    return Clip(**{"prompt": "a kite", "negative": "", "height": 64, "width": 96, "frames": 5, "steps": 1, "cfg": 1.0,
                   "seed": 3, **changes})  # fmt: skip


def test_frames_that_are_given_are_kept_and_the_others_made(images):
    first, last = images
    assert frame_mask(clip()).tolist() == [1] * 5 and frame_mask(clip(image=first)).tolist() == [0, 1, 1, 1, 1]
    assert frame_mask(clip(image=first, last_image=last)).tolist() == [0, 1, 1, 1, 0]
    given = kept_frames(clip(image=first)).float() / 65535
    assert given.shape == (1, 5, 64, 96, 3) and (given[0, 1:] - 0.5).abs().max() < 1e-5 and given[0, 0].std() > 0.1
    both = kept_frames(clip(image=first, last_image=last)).float() / 65535
    assert torch.equal(both[0, 0], given[0, 0]) and torch.equal(both[0, 1:4], given[0, 1:4])
    fitted = np.asarray(Image.open(last).resize((96, 64)))  # about what it was scaled and cropped to
    assert abs(both[0, 4].mean().item() - fitted.mean() / 255) < 0.02


def test_what_the_transformer_sees(monkeypatch, folder, images):
    """The kept part's latents, the made part's, and the mask, as the published code lays them out.

    There a latent frame has the mask of the frame in its middle: of five frames those of the second and the fourth.
    """
    from t3.pipeline import Engine

    options = Options(device="cpu", dtype="fp32", backend="sdpa")
    engine = Engine.load(find_sources(model=str(folder)), PLAN, options, Grid(2, 4, 6), lambda text: None)
    seen = []
    engine.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["control_hidden_states"]), with_kwargs=True
    )
    encodes = []
    plain_encode = encoder.encode_frames
    monkeypatch.setattr(encoder, "encode_frames", lambda *a, **b: encodes.append(a[1].shape) or plain_encode(*a, **b))
    alone = [engine.sample(clip(seed=seed, prompt=text)) for seed, text in ((3, "a kite"), (4, "a red kite"))]
    engine.sample(clip(image=images[0]))
    plain, _, kept = seen
    assert torch.equal(plain[:, :16], plain[:, 16:32]) and (plain[:, 32:] == 1).all()
    assert encodes == [(1, 5, 64, 96, 3)] * 3  # grey once for both of its clips
    video = 2 * (kept_frames(clip(image=images[0])).float() / 65535).movedim(-1, 1) - 1
    video[:, :, 1:] = 0
    vae = engine.vae
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        kept_latents, made_latents = (
            (AutoencoderKLWan.encode(vae, v).latent_dist.mode() - mean) / std for v in (video, 0 * video)
        )
    torch.testing.assert_close(kept[:, :16], kept_latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept[:, 16:32], made_latents, rtol=1e-4, atol=1e-4)
    assert (kept[:, 32:] == 1).all()
    both = engine.sample_batch([clip(), clip(seed=4, prompt="a red kite")])  # one after the other: equal in each bit
    assert torch.equal(both, torch.cat(alone))


def test_from_a_file_of_original_names(capsys, folder, images):
    """The folder's weights converted to the published names, as one file: the same latents, and the dry run's facts."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert convert.main([str(weights), "--to", "original", "--out", "vace.safetensors"]) == 0
    size = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "2", "--prompt", "a kite", "--json"]
    rest = [*size, "--model", str(folder), "--no-decode", "--overwrite"]
    found = []
    for more in ([], ["--dit", "vace.safetensors"]):
        assert generate.main([*rest, "--latents-out", "l.latent", *more]) == 0
        found.append(load_latents("l.latent")[0])
    # Where a weight begins in its file decides how it is aligned, and that in which order products are summed.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert generate.main([*rest, "--latents-out", "l.latent", "--dit", "vace.safetensors", "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = WanVACETransformer3DModel.from_pretrained(folder / "transformer")
    assert facts["model"]["name"] == "wan-vace" and facts["model"]["parameters"] == model.num_parameters()


def test_every_control_block_is_counted():
    """Products of a dense plan, and of the linear layers: every weight of one is used once per token."""
    model = transformer()
    grid, tokens, text = (10, 10, 10), 1000, 512
    expected = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("condition_embedder.time"):
            from_text = "attn2.to_k" in name or "attn2.to_v" in name or "text_embedder" in name
            expected += module.weight.numel() * (text if from_text else tokens)
    expected += (model.patch_embedding.weight.numel() + model.vace_patch_embedding.weight.numel()) * tokens
    expected += 8 * 2 * tokens * text * 256  # cross-attention's products
    shape = ModelShape.from_config(model.config)
    cost = model_cost(shape, Plan.preset("dense"), grid)
    assert cost.other == expected and cost.attention_t3 == cost.attention_dense == 8 * 2 * 256 * tokens**2
    halves = Plan("halves", Grid(*grid), ((1, 1, 1), (1, 2, 1)))  # of layers 0, 2 and 3 one has two windows
    dense_layers, cut = 3 + 2, 2 + 1
    want = (dense_layers + cut * 2 * 0.5) * 2 * 256 * tokens**2
    assert model_cost(shape, halves, grid).attention_t3 == want
