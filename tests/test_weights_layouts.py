"""The name tables: complete, one to one, equal to diffusers' converter where that is right, and in running order."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from transformers import UMT5Config, UMT5EncoderModel

from t3.errors import T3Error
from t3.weights import known_config
from t3.weights.catalogue import NAMES
from t3.weights.layout_dit import dit_config, dit_layout, to_diffusers, to_original
from t3.weights.layout_text import text_config, text_layout
from t3.weights.layout_text import to_huggingface as text_forth
from t3.weights.layout_text import to_original as text_back
from t3.weights.layout_vae import vae_config, vae_config_from_diffusers, vae_layout
from t3.weights.load import transformer_class
from tests.weights_fixtures import (
    TINY,
    TINY_FLF2V,
    TINY_I2V,
    names_for,
    one_thread,  # noqa: F401
)

VAE21 = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "is_residual": False}
VAE21 |= {"temperal_downsample": [False, True, True], "in_channels": 3, "out_channels": 3, "patch_size": None}
VAE22 = VAE21 | {"decoder_base_dim": 12, "z_dim": 6, "is_residual": True, "in_channels": 12, "out_channels": 12}
VAE22 |= {"patch_size": 2, "scale_factor_spatial": 16}
VAES = {
    "2.1": VAE21,
    "2.1 other depth": VAE21 | {"num_res_blocks": 1, "dim_mult": [1, 2, 2], "temperal_downsample": [True, False]},
    "2.2": VAE22,
    "2.2 other depth": VAE22 | {"num_res_blocks": 3, "dim_mult": [1, 4, 4], "temperal_downsample": [False, True]},
}


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


def agree(layout, model):
    want = shapes_of(model)
    want.pop("encoder.embed_tokens.weight", None)
    assert {param.name: param.shape for param in layout.values()} == want
    assert len(layout) == len(want)


@pytest.mark.parametrize("name", NAMES["dit"])
def test_shipped_transformers(name):
    config = known_config(name)
    layout = dit_layout(config)
    agree(layout, on_meta(lambda: transformer_class(config)(**config)))
    assert dit_config({key: param.shape for key, param in layout.items()}) == config


@pytest.mark.parametrize("name", NAMES["vae"])
def test_shipped_vaes(name):
    config = known_config(name)
    layout = vae_layout(config)
    agree(layout, on_meta(lambda: AutoencoderKLWan(**config)))
    assert len(config["latents_mean"]) == len(config["latents_std"]) == config["z_dim"]
    inferred = vae_config({key: param.shape for key, param in layout.items()})
    assert inferred == {key: value for key, value in config.items() if not key.startswith("latents_")}


def test_statistics_of_the_first_vae_are_the_library_defaults():
    model = AutoencoderKLWan(base_dim=4)
    config = known_config("wan2.1-vae")
    assert list(model.config.latents_mean) == config["latents_mean"]
    assert list(model.config.latents_std) == config["latents_std"]


def test_shipped_text_encoder():
    config = known_config("umt5-xxl")
    layout = text_layout(config)
    agree(layout, on_meta(lambda: UMT5EncoderModel(UMT5Config(**config))))
    assert text_config({key: param.shape for key, param in layout.items()}) == config


def test_unknown_config():
    with pytest.raises(T3Error, match=r"wan9.*wan2\.1-t2v-1\.3b"):
        known_config("wan9")


@pytest.mark.parametrize("config", [TINY, TINY_I2V, TINY_FLF2V], ids=["t2v", "i2v", "flf2v"])
def test_transformer_names_against_the_library_converter(config):
    want = names_for(config)
    assert {key: to_diffusers(key) for key in want} == want
    assert {theirs: to_original(theirs) for theirs in want.values()} == {b: a for a, b in want.items()}
    layout = dit_layout({**config, "patch_size": list(config["patch_size"])})
    assert {key: param.name for key, param in layout.items()} == want


@pytest.mark.parametrize(
    "name", ["blocks.0.norm2.weight", "blocks.x.modulation", "blocks.00.modulation", "head", "blocks.0.self_attn.q"]
)
def test_names_that_are_none(name):
    assert to_diffusers(name) is None


@pytest.mark.parametrize("name", VAES)
def test_vae_layout_of_any_size(name):
    config = VAES[name]
    layout = vae_layout(config)
    agree(layout, AutoencoderKLWan(**config))
    original = {key: param.shape for key, param in layout.items()}
    theirs = {param.name: param.shape for param in layout.values()}
    inferred = vae_config(original)
    assert inferred == vae_config_from_diffusers(theirs)
    assert vae_layout(inferred) == layout


def test_first_vae_against_the_library_converter():
    layout = vae_layout(VAE21)
    converted = convert_wan_vae_to_diffusers({key: key for key in layout})
    assert {key: param.name for key, param in layout.items()} == {key: theirs for theirs, key in converted.items()}


def natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def run_order(model, act):
    """Names of the modules that own parameters, in the order in which they first run."""
    ran = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name) if name not in ran else None)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    with torch.no_grad():
        act()
    for hook in hooks:
        hook.remove()
    return ran


@pytest.mark.parametrize("name", ["2.1", "2.2"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_vae_layers_run_in_the_order_of_their_original_numbers(name, side):
    """The original keeps its layers in numbered sequences: a wrong pairing would run out of order.

    Shortcuts, time convolutions and the attention's parts stand beside the sequences; their shapes tell them apart.
    """
    config = VAES[name]
    model = AutoencoderKLWan(**config).eval()
    z, pixels = config["z_dim"], 16 if name == "2.1" else 32
    act = {
        "encoder": lambda: model.encode(torch.zeros(1, 3, 1, pixels, pixels)),
        "decoder": lambda: model.decode(torch.zeros(1, z, 1, 2, 2)),
    }[side]
    ran = [module for module in run_order(model, act) if module.startswith(side)]
    modules = {key.rpartition(".")[0]: param.name.rpartition(".")[0] for key, param in vae_layout(config).items()}
    stages = {"conv1": 0, "downsamples": 1, "upsamples": 2, "middle": 1.5, "head": 3}
    order = sorted((m for m in modules if m.startswith(side)), key=lambda m: (stages[m.split(".")[1]], natural(m)))
    beside = ("shortcut", "time_conv", "to_qkv", "proj")
    assert [modules[m] for m in order if not m.endswith(beside)] == [m for m in ran if not m.endswith(beside)]


def test_text_names_are_one_to_one():
    config = {**known_config("umt5-xxl"), "num_layers": 2}
    layout = text_layout(config)
    assert len(layout) == 2 * 10 + 2
    for key, param in layout.items():
        assert text_forth(key) == param.name and text_back(param.name) == key
    assert text_forth("blocks.0.attn.z.weight") is None and text_back("encoder.block.0.nothing") is None
