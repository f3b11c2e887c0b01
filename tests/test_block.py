"""Blocks by chunks of tokens and groups of heads: the same result as whole, in less memory, in the headless engine."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from test_fused import inputs as attention_inputs
from test_fused import reference
from test_processor import PLAN, SMALL, inputs, run, transformer

from t3 import Grid, Partition, chunks, fused, memory, processor
from t3.backends import BACKENDS, choose
from t3.block import Linear, Projections, Windows, attend
from t3.chunks import of_tokens, token_chunks
from t3.cost import ModelShape, activation_bytes
from t3.memory import BlockShape, Share, block_bytes, pick, plain_block_bytes, shares
from t3.processor import compile_blocks, install_t3
from t3.weights import known_config

GIB = 2**30


@given(tokens=st.integers(1, 5000), batch=st.integers(1, 3), rows=st.integers(1, 3000))
def test_chunks_make_up_all_tokens(tokens, batch, rows):
    found = token_chunks(tokens, batch, rows)
    assert [i for some in found for i in range(some.start, some.stop)] == list(range(tokens))
    sizes = [some.stop - some.start for some in found]
    assert all(size * batch <= max(rows, chunks.TILE * batch) for size in sizes)
    assert len(found) == 1 or all(size % chunks.TILE == 0 for size in sizes[:-1])


@given(tokens=st.integers(1, 60), given_=st.integers(1, 60), data=st.data())
def test_modulation_of_some_tokens(tokens, given_, data):
    each = tokens // given_ + (tokens % given_ > 0)
    table = torch.arange(given_, dtype=torch.float32).view(1, -1, 1)
    first = data.draw(st.integers(0, tokens - 1))
    rows = slice(first, data.draw(st.integers(first + 1, tokens)))
    some = of_tokens(table, rows, tokens)
    expected = [0 if given_ == 1 else i // each for i in range(rows.start, rows.stop)]
    assert some.expand(-1, len(expected), -1).flatten().tolist() == expected


# --- Attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True], ids=["plain torch", "kernels' ops"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beside", [(0, 0), (9, 0), (0, 9), (3, 30)], ids=str)
@pytest.mark.parametrize(
    ("grid", "partition", "batch"),
    [((3, 5, 7), (2, 3, 2), 2), ((4, 3, 5), (4, 1, 1), 1), ((4, 3, 5), (2, 1, 1), 2), ((2, 3, 4), (1, 1, 1), 2)],
)
def test_every_share_gives_the_reference(monkeypatch, kernels, dtype, beside, grid, partition, batch):
    """beside: tokens before and after the grid; chunks begin and end among them, or hold none of the grid's."""
    monkeypatch.setattr(fused, "triton_usable", lambda device, dtype: kernels)
    prefix, suffix = beside
    heads, width, tokens = 5, 80, prefix + Grid(*grid).tokens + suffix
    _, more = attention_inputs(grid, batch=batch, heads=heads, dtype=dtype, beside=prefix + suffix)
    generator = torch.Generator().manual_seed(7)
    x, bias = torch.randn(batch, tokens, width, generator=generator, dtype=dtype), torch.randn(width, dtype=dtype)
    weights = [torch.randn(width, width, generator=generator, dtype=dtype) / 9 for _ in range(3)]
    linears = [Linear(lambda y, w=w: y @ w.T + bias, w, bias) for w in weights]
    truth = reference([x @ w.T + bias for w in weights], grid, partition, **more, prefix=prefix, suffix=suffix)
    some = [slice(0, 7), slice(7, 20), slice(20, tokens - 3), slice(tokens - 3, tokens)]
    projections = Projections(
        (batch, tokens, width), x, lambda rows: x[:, rows], *linears, heads, more["norms"], 1e-6, more["turns"]
    )
    windows = Windows(Grid(*grid), Partition(*partition), BACKENDS["sdpa"], prefix)
    for share in shares(heads):
        out = attend(projections, windows, share, some)
        assert out.is_contiguous() and out.dtype == dtype
        assert (out - truth).norm() <= (1e-14 if dtype == torch.float64 else 3e-6) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [None, slice(16, 56)])
def test_a_projection_into_its_place_is_the_layer_s_own_bit_for_bit(dtype, channels):
    layer = torch.nn.Linear(48, 80).to(dtype)
    linear = Linear(layer, layer.weight, layer.bias)
    x = torch.randn(2, 37, 48, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)[..., slice(None) if channels is None else channels]
        alone = linear.some(x, channels)
        assert torch.allclose(alone, expected, rtol=0.02, atol=0.02)
        wide = x.new_full((2, 50, alone.shape[2] + 8), torch.nan)
        places = [torch.full_like(alone, torch.nan), wide[:, 5:42, 8:], wide[:1, 5:42, 4:-4]]
        for place in places:
            some = x[: place.shape[0]]
            linear.some_into(some, channels, place)
            assert torch.equal(place, linear.some(some, channels))
        for other in (linear._replace(bias=None, weight=None), linear._replace(bias=layer.bias.float())):
            place = torch.full_like(expected, torch.nan)
            if channels is None:
                other.some_into(x, None, place)
                assert torch.equal(place, layer(x))
    place = torch.zeros_like(layer(x))
    linear.some_into(x, None, place)
    assert place.requires_grad, "with gradients it is a copy that has them"


# --- Whole transformers --------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens and more. Gives the list of the sizes that feed-forwards saw."""
    monkeypatch.setattr(chunks, "TILE", 16)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 32 * 256 * 4)


def sizes_seen(model):
    seen = []
    model.blocks[0].ffn.net[2].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    return seen


CASES = {
    "text": ({}, {}),
    "batch of two, odd sizes": ({}, {"grid": (3, 5, 7), "batch": 2}),
    "no norm before cross-attention": ({"cross_attn_norm": False}, {}),
    "timesteps per token": ({}, {"timestep": torch.full((1, 192), 500.0)}),
    "image": (
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256},
        {"channels": 36, "encoder_hidden_states_image": torch.ones(1, 257, 1280)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_change_nothing(small_chunks, monkeypatch, case):
    config, changes = CASES[case]
    model, arguments = transformer(num_layers=2, **config), inputs(**changes)
    seen = sizes_seen(model)
    installed = install_t3(model, PLAN, backend="sdpa")
    with monkeypatch.context() as whole:
        whole.setattr(memory, "CHUNK_BYTES", 2**40)
        plain = run(model, arguments)
    installed.remove()
    tokens = arguments["hidden_states"][0, 0].numel() // 4
    assert seen == [tokens]
    for way in ("fast", "lean"):
        installed = install_t3(model, PLAN, backend="sdpa", memory=way)
        before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        out = run(model, arguments)
        assert ((out - plain).norm() / plain.norm()).item() < 1e-5
        assert all(torch.equal(arguments[name], x) for name, x in before.items())
        installed.remove()
    assert len(seen) > 8 and max(seen[1:]) <= 32


def test_vace_blocks_go_by_chunks_too(small_chunks, monkeypatch):
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(**{**SMALL, "num_layers": 2}, in_channels=16, out_channels=16, vace_layers=[0, 1])
    control = torch.randn(1, 96, 2, 16, 24, generator=torch.Generator().manual_seed(5))
    arguments, seen = inputs(control_hidden_states=control), []
    for block in (model.blocks[1], *model.vace_blocks):
        block.ffn.net[2].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    install_t3(model.eval(), PLAN, backend="sdpa", memory="lean")
    out = run(model, arguments)
    assert len(seen) == 3 * 6 and max(seen) == 32
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2**40)
    plain = run(model, arguments)
    assert ((out - plain).norm() / plain.norm()).item() < 1e-5


def test_inputs_of_blocks_are_not_written_to(small_chunks):
    """Whoever keeps a block's input, as caches do, must find it as it was."""
    model, arguments = transformer(num_layers=2), inputs()
    installed = install_t3(model, PLAN, backend="sdpa", memory="lean")
    kept = []
    for block in model.blocks:
        forward = block.forward

        def watching(x, *args, forward=forward):
            kept.append((x, x.clone()))
            return forward(x, *args)

        block.forward = watching
    run(model, arguments)
    assert len(kept) == 2 and all(torch.equal(x, copy) for x, copy in kept)
    installed.remove()
    assert vars(model.blocks[0])["forward"] is not None, "somebody's wrapper was taken off"


def test_fused_projections_and_diffusers_backends(small_chunks, monkeypatch):
    model, arguments, asked = transformer(num_layers=2), inputs(), []
    through = processor._through_diffusers
    monkeypatch.setattr(processor, "_through_diffusers", lambda name: asked.append(name.value) or through(name))
    install_t3(model, PLAN, memory=1)
    plain = run(model, arguments)
    assert not asked
    model.set_attention_backend("native")
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5
    assert asked == ["native"] * 2
    model.fuse_qkv_projections()
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5


def test_what_is_not_diffusers_own_runs_whole_and_is_named(small_chunks):
    model, arguments = transformer(num_layers=2), inputs()
    seen, said = sizes_seen(model), []
    install_t3(model, PLAN, backend="sdpa", say=said.append)
    chunked = run(model, arguments)
    assert max(seen) == 32 and not said
    model.blocks[0].ffn.register_forward_hook(lambda module, args, out: None)
    seen.clear()
    whole = run(model, arguments)
    run(model, arguments)
    assert seen == [192, 192]
    assert ((whole - chunked).norm() / chunked.norm()).item() < 1e-5
    assert said == ["blocks run whole, which takes more memory: its feed-forward is of another kind."]


def test_weights_in_eight_bits(small_chunks):
    """diffusers' layerwise casting changes each layer's weights around its call."""
    model, arguments = transformer(num_layers=2), inputs()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    seen = sizes_seen(model)
    installed = install_t3(model, PLAN, backend="sdpa", memory="lean")
    out = run(model, arguments)
    assert max(seen) == 32
    installed.remove()
    dtypes = []
    with pytest.MonkeyPatch.context() as noting:
        noting.setattr(processor, "choose", lambda name, s: dtypes.append(s.dtype) or choose(name, s))
        installed = install_t3(model, PLAN, memory="lean")
        run(model, arguments)
        installed.remove()
    assert set(dtypes) == {torch.float32}, "a backend is chosen for what is computed, not for what is stored"
    plain = transformer(num_layers=2)
    plain.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    install_t3(plain, PLAN, backend="sdpa")
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(memory, "CHUNK_BYTES", 2**40)
        expected = run(plain, arguments)
    assert ((out - expected).norm() / expected.norm()).item() < 1e-5


def test_gradients_take_the_plain_way(small_chunks):
    model = transformer(num_layers=2)
    install_t3(model, PLAN)
    model(**inputs())[0].square().mean().backward()
    assert all(block.ffn.net[2].weight.grad.abs().max() > 0 for block in model.blocks)


def test_compiled_blocks_are_whole_and_without_a_graph_break(small_chunks):
    torch._dynamo.reset()
    model, arguments = transformer(num_layers=2), inputs((3, 5, 7))
    install_t3(model, PLAN, backend="sdpa")
    plain = run(model, arguments)
    compile_blocks(model, PLAN, backend="aot_eager")
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5


# --- What is claimed -----------------------------------------------------------------------------------------------

SHAPES_4K = {
    "wan2.1-t2v-1.3b": 21 * 136 * 240,
    "wan2.2-ti2v-5b": 21 * 68 * 120,
    "wan2.1-t2v-14b": 21 * 136 * 240,
}


@pytest.mark.parametrize("name", SHAPES_4K)
def test_ways_need_less_and_less(name):
    shape = ModelShape.from_config(known_config(name)).block(SHAPES_4K[name])
    needed = [block_bytes(shape, way) for way in shares(shape.heads)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] < plain_block_bytes(shape)
    assert needed[-1] < 3.3 * shape.tensor
    # Nothing but the block's input and output is full-sized where projections are in parts.
    assert all(way.heads is None or way.heads <= shape.heads // 2 for way in shares(shape.heads))


def test_the_bars_at_4k():
    """Less what is beside a block: weights, rotations, a sampler's latents."""
    gib = {
        name: [
            block_bytes(ModelShape.from_config(known_config(name)).block(tokens), way) / GIB
            for way in shares(known_config(name)["num_attention_heads"])
        ]
        for name, tokens in SHAPES_4K.items()
    }
    assert gib["wan2.1-t2v-1.3b"][2] < 16 - 5.0 and gib["wan2.1-t2v-1.3b"][-1] < 12 - 5.0
    assert gib["wan2.2-ti2v-5b"][-1] < 6 - 1.4
    assert gib["wan2.1-t2v-14b"][-1] < 48e9 / GIB - 13.4 - 2.4


def test_whole_blocks_need_more():
    shape = ModelShape.from_config(known_config("wan2.1-t2v-1.3b"))
    by_way = [activation_bytes(shape, 685_440, share=way) for way in (None, *shares(shape.heads))]
    assert by_way == sorted(by_way, reverse=True) and by_way[0] > 1.8 * by_way[1]


def test_what_is_picked_and_why():
    shape = BlockShape(1536, 8960, 12, 1, 685_440)
    ways = shares(12)

    def needed(way):
        return block_bytes(shape, way)

    assert pick("auto", ways, needed, 80 * GIB)[0] == Share()
    share, why = pick("auto", ways, needed, 10.5 * GIB)
    assert share == Share(3) and "lean: 3 heads at a time; it needs" in why and "The fastest way needs 15.7" in why
    share, why = pick("auto", ways, needed, GIB)
    assert share == ways[-1] and "too little" in why
    assert pick("fast", ways, needed, GIB)[0] == ways[0]
    assert pick("lean", ways, needed, 80 * GIB)[0] == ways[-1]
    assert Share(4) in shares(40) and shares(2)[-1] == Share(1, 2) and shares(1)[-1] == Share(1)


def test_where_projections_cannot_be_cut_no_way_does():
    assert all(way.parts == 1 for way in shares(12, parts=False))
