"""The decoder against diffusers' own, in float64 and in float32; and weights it must refuse."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from vae_fixtures import NAMES, SCALE, as_frames, config, off, random_latents, random_state, small_decoder
from vae_fixtures import one_thread as one_thread

from t3.errors import T3Error
from t3.vae import WanDecoder
from t3.vae.attend import attend
from t3.vae.layers import Attention, run_blocks
from t3.vae.past import Past
from t3.vae.sums import Sum
from t3.vae.tiles import Span, Window
from t3.weights.layout_vae import vae_layout


@pytest.fixture
def all_float64(monkeypatch):
    """diffusers upsamples in float32 whatever the dtype; here it takes the tensors as they are."""
    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", torch.nn.Upsample.forward)


def library(name, state, **changes):
    """diffusers' VAE with these weights, under its names, in their dtype."""
    layout = vae_layout(config(name, **changes))
    model = AutoencoderKLWan(**config(name, **changes)).to(next(iter(state.values())).dtype)
    model.load_state_dict({param.name: state[key] for key, param in layout.items()}, strict=True)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 4, 3), (4, 5, 2)])
def test_float64_is_diffusers_float64(all_float64, name, shape):
    latents = random_latents(name, *shape, batch=2)
    state = random_state(name)
    with torch.no_grad():
        wanted = library(name, state).decode(latents).sample
    found = WanDecoder.from_state_dict(state).untiled(latents)
    assert found.shape == (2, 3, 4 * shape[0] - 3, SCALE[name] * shape[1], SCALE[name] * shape[2])
    assert off(found.clamp(-1, 1), wanted) < 1e-12
    assert wanted.std() > 0.1


def test_a_shortcut_deals_out_channels_to_frames(all_float64):
    """Where time is upsampled and channels are halved at once, the two frames get different ones of them."""
    changes = {"temperal_downsample": [True, True, False]}
    latents, state = random_latents("wan2.2-vae", 2, 2, 3), random_state("wan2.2-vae", **changes)
    with torch.no_grad():
        wanted = library("wan2.2-vae", state, **changes).decode(latents).sample
    assert off(WanDecoder.from_state_dict(state).untiled(latents).clamp(-1, 1), wanted) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_near_to_float64_as_diffusers(name):
    latents = random_latents(name, 3, 4, 6, dtype=torch.float32)
    state = random_state(name, dtype=torch.float32)
    exact = as_frames(WanDecoder.from_state_dict(state, dtype=torch.float64).untiled(latents))
    with torch.no_grad():
        theirs = as_frames(library(name, state).decode(latents).sample)
    ours = as_frames(WanDecoder.from_state_dict(state).untiled(latents))
    assert ours.dtype == torch.float32
    assert off(ours, exact) <= 2 * off(theirs, exact) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_are_as_near_to_float64_as_diffusers(name, dtype):
    latents = random_latents(name, 2, 4, 5, dtype=dtype)
    state = random_state(name, dtype=dtype)
    exact = as_frames(WanDecoder.from_state_dict(state, dtype=torch.float64).untiled(latents))
    with torch.no_grad():
        theirs = as_frames(library(name, state).decode(latents).sample.double())
    ours = as_frames(WanDecoder.from_state_dict(state).untiled(latents).double())
    assert (ours - exact).square().mean() <= 1.2**2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_under_both_names_and_without_the_encoder(name):
    state = random_state(name)
    latents = random_latents(name, 2, 2, 3)
    wanted = WanDecoder.from_state_dict(state).untiled(latents)
    others = (
        library(name, state).state_dict(),
        {key: value for key, value in state.items() if key.startswith(("decoder.", "conv2."))},
    )
    for other in others:
        assert torch.equal(WanDecoder.from_state_dict(other).untiled(latents), wanted)


def test_the_weights_given_stay_as_they_are():
    state = random_state("wan2.2-vae")
    before = {key: value.clone() for key, value in state.items()}
    decoder = WanDecoder.from_state_dict(state, device="cpu", dtype=torch.float32)
    decoder.untiled(random_latents("wan2.2-vae", 2, 2, 2))
    assert (decoder.device.type, decoder.dtype) == ("cpu", torch.float32)
    assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("name", "generation", "channels", "patch"), [(NAMES[0], "2.1", 16, 1), (NAMES[1], "2.2", 48, 2)]
)
def test_the_structure_is_read_from_the_weights(name, generation, channels, patch):
    structure = small_decoder(name).structure
    assert structure.generation == f"Wan{generation}"
    assert (structure.latent_channels, structure.patch, structure.scale) == (channels, patch, SCALE[name])
    assert [len(level.blocks) for level in structure.levels] == [3, 3, 3, 3]
    assert [level.upsample and level.upsample.temporal for level in structure.levels] == [True, True, False, None]
    assert [structure.frames(n) for n in (1, 2, 21)] == [1, 5, 81]


@pytest.mark.parametrize("memory", [None, 1, 3000, 10**9])
def test_attention_is_the_same_in_pieces(memory):
    name = "wan2.1-vae"
    attention = Attention(random_state(name), "decoder.middle.1")
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    qkv = torch.nn.functional.conv2d(
        torch.nn.functional.normalize(x, dim=1) * 4 * attention.norm.gamma[:, None, None],
        attention.to_qkv.weight,
        attention.to_qkv.bias,
    )
    q, k, v = (part.flatten(2) for part in qkv.chunk(3, dim=1))
    weights = (torch.einsum("bcq,bck->bqk", q, k) / 4).softmax(-1)
    attended = torch.einsum("bqk,bck->bcq", weights, v).view_as(x)
    wanted = x + torch.nn.functional.conv2d(attended, attention.proj.weight, attention.proj.bias)
    assert off(attention(Sum(x, Window.whole(5, 7)), memory).value(), wanted) < 1e-13


@pytest.mark.parametrize(("memory", "rows"), [(None, [35]), (1, [1] * 35), (13 * 1680 + 1, [13, 13, 9]), (10**9, [35])])
def test_attention_holds_no_more_scores_than_it_may(monkeypatch, memory, rows):
    """Of a query: scores, their softmax and a copy, of two samples' 35 keys in float64."""
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append(q.shape[2]) or plain(q, k, v),
    )
    qkv = torch.randn(3, 2, 35, 16, dtype=torch.float64).unbind(0)
    attend(*qkv, memory)
    assert seen == rows


@pytest.mark.parametrize("keep", [False, True])
def test_a_level_holds_on_to_its_input_only_where_it_is_wanted_after(keep):
    """Whoever calls still has the sum in hand; its tensors are gone, or a shortcut needs them."""
    blocks, whole = small_decoder("wan2.1-vae").levels[-1].blocks, Window.whole(4, 5)
    x = Sum(torch.randn(1, 4, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last), whole)
    run_blocks(blocks, x, Past(), (whole,) * 4, keep)
    assert (x._value is not None) == keep and x._terms is None


@pytest.mark.parametrize(("frames", "places"), [(None, 3), (5, 3), (2, 2), (1, 1)])
def test_the_past_has_room_for_the_frames_that_come_and_no_more(frames, places):
    layer, past, frame = torch.nn.Identity(), Past(frames), torch.zeros(1, 4, 5, 6)
    assert past.place(layer, 3, frame).untyped_storage().nbytes() == places * frame.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_pixels_depend_on_the_halo_and_on_nothing_beyond(name):
    """Not-a-number goes wherever a sum goes: from outside a tile's input never into its core, from its edge always."""
    decoder = small_decoder(name)
    whole, core = Window.whole(1, 40), Window(Span(0, 1, 1), Span(17, 20, 40))
    seen = decoder.windows(core)[0][0].cols
    assert (seen.start, seen.stop) == (17 - 13, 20 + 13)

    def poisoned(*columns):
        middle = torch.zeros(1, decoder.structure.width, 1, 40, dtype=torch.float64)
        middle[..., columns] = torch.nan
        past = Past()
        with torch.no_grad():
            (frame,) = decoder.pixels(middle, past, whole, decoder.windows(whole))
        return bool(frame[core.scaled(decoder.structure.scale).here].isnan().any())

    assert not poisoned(*range(seen.start), *range(seen.stop, 40))
    assert poisoned(seen.start) and poisoned(seen.stop - 1)


def without(key):
    return lambda state: state.pop(key)


def alpha(state):
    state["decoder.head.2.weight"] = torch.zeros(4, *state["decoder.head.2.weight"].shape[1:])


def shuffled(state):
    state["decoder.head.2.weight"] = torch.zeros(12, *state["decoder.head.2.weight"].shape[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("decoder.middle.0.residual.0.gamma"), "no Wan VAE: decoder.middle.0.residual.0.gamma is missing"),
        (without("decoder.upsamples.5.residual.2.weight"), "decoder.upsamples.5.residual.2.weight is missing"),
        (without("decoder.head.0.gamma"), "no whole Wan2.1 VAE: decoder.head.0.gamma is missing"),
        (without("conv2.bias"), "conv2.bias is missing"),
        (without("decoder.middle.1.to_qkv.bias"), "decoder.middle.1.to_qkv.bias is missing"),
        (alpha, "gives 4 channels; only RGB"),
        (shuffled, "gives 12 channels where the released one gives 3"),
    ],
)
def test_other_weights_are_refused(change, words):
    state = random_state("wan2.1-vae")
    change(state)
    with pytest.raises(T3Error, match=words):
        WanDecoder.from_state_dict(state)


def test_half_a_diffusers_vae_is_refused():
    state = library("wan2.1-vae", random_state("wan2.1-vae")).state_dict()
    for key in [key for key in state if key.startswith("encoder.")]:
        del state[key]
    with pytest.raises(T3Error, match="diffusers' names but are no whole Wan VAE"):
        WanDecoder.from_state_dict(state)


def test_no_arithmetic_in_eight_bits():
    with pytest.raises(T3Error, match="dtype is torch.float8_e4m3fn; the decoder works in bfloat16"):
        WanDecoder.from_state_dict(random_state("wan2.1-vae"), dtype=torch.float8_e4m3fn)
