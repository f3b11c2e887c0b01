"""The embedded model's files for ComfyUI: its own loaders open them, and it computes what the command line does."""

from __future__ import annotations

import sys

import pytest
import torch
from host_nodes import run
from small_models import build_like_embedded

from t3.embedded_files import FILES, main, write_files
from t3.jobs import Clip, Options
from t3.pipeline import Engine
from t3.plan import Grid, Plan
from t3.sources import find_sources
from tools.workflows import EMPTY_PADDING_WORDS, PADDING_WORDS

pytest_plugins = ["host_node_fixtures"]
PROMPT = "a red square moving left"  # 6 tokens, its end included
HEIGHT, WIDTH, FRAMES, STEPS = 112, 160, 9, 4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model like the embedded one, and a folder `models` with its files."""
    folder = tmp_path_factory.mktemp("small")
    model = build_like_embedded(folder / "model")
    write_files(model, folder / "models")
    return model, folder / "models"


@pytest.fixture(scope="module")
def engine(small):
    sources = find_sources(model=str(small[0]))
    grid = Grid.from_video(FRAMES, HEIGHT, WIDTH, sources.pixels_per_token)
    plan = Plan.from_json(sources.plan_json)
    return Engine.load(sources, plan, Options(dtype="fp32", device="cpu"), grid, lambda text: None)


@pytest.fixture(scope="module")
def clip(pack, small):
    """The text encoder, by what CLIPLoader calls."""
    import comfy.sd

    return comfy.sd.load_clip([str(small[1] / FILES["text_encoder"])], clip_type=comfy.sd.CLIPType.WAN)


def encoded(clip, text):
    import nodes

    return nodes.CLIPTextEncode().encode(clip, text)[0]


@pytest.mark.parametrize(
    "text", [PROMPT, "Two small blue circles, both turning on a gray background.", "a sharp red kite", ""]
)
def test_texts_mean_the_same(clip, engine, text):
    """The first 128 channels are the encoder's own, the others nothing. The weights of five norms on the way are
    rounded to half precision once more, each by 2^-11 at most."""
    ((found, _),) = encoded(clip, text)
    tokens = found.shape[1]
    ours = engine.pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    assert ours.shape == (1, 512, 128) and not ours[:, tokens:].any() and ours[:, tokens - 1].any()
    error = (found[..., :128] - ours[:, :tokens]).norm(dim=-1) / ours[:, :tokens].norm(dim=-1)
    assert error.max() < 5 * 2**-11
    assert not found[..., 128:].any()


@torch.inference_mode()
def test_a_clip_is_the_same_as_by_the_command_line(pack, nodes, small, clip, engine):
    """From prompt to pixels, by the nodes of the workflow: noise, levels, padding and plan are the same, so that what
    is left is rounding of float32 over four steps, and that of the text."""
    import comfy.sd
    import comfy.utils

    import nodes as host

    model = comfy.sd.load_diffusion_model(str(small[1] / FILES["transformer"]))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(small[1] / FILES["vae"])))
    assert (model.model.diffusion_model.num_heads, vae.latent_channels) == (2, 16)
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    plan = sys.modules[f"{pack.__name__}.t3"].Plan.from_json(engine.plan.to_json())
    tuned = run(nodes["T3Attention"], model=model, custom_plan=plan)[0]
    (shifted,) = ModelSamplingSD3().patch(tuned, 5.0)

    def padded(text, words):
        (zeros,) = host.ConditioningZeroOut().zero_out(encoded(clip, " ".join(["a"] * words)))
        (found,) = host.ConditioningConcat().concat(encoded(clip, text), zeros)
        assert found[0][0].shape == (1, 512, 768)
        return found

    positive, negative = padded(PROMPT, PADDING_WORDS), padded("", EMPTY_PADDING_WORDS)
    empty = {"samples": torch.zeros(1, 16, 3, HEIGHT // 8, WIDTH // 8)}
    how = (7, STEPS, 2.0, "euler", "simple", positive, negative, empty)
    found = host.common_ksampler(shifted, *how)[0]["samples"]
    ours = engine.sample(Clip(PROMPT, "", HEIGHT, WIDTH, FRAMES, STEPS, 2.0, 7))
    assert (found - ours).norm() / ours.norm() < 1e-3
    pixels = engine.vae.decode(ours).sample.clamp(-1, 1)[0].permute(1, 2, 3, 0) / 2 + 0.5
    assert (vae.decode(found) - pixels).abs().max() < 0.02


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "models")]) == 2
    assert "no such folder" in capsys.readouterr().err
