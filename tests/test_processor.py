"""T3 inside a diffusers Wan transformer: equal to the reference layer by layer, equal to dense where it should be."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from t3 import Plan, fused, processor
from t3.cost import ModelShape, activation_bytes
from t3.kernels.attention.naive import t3_attention_reference
from t3.memory import Share, block_bytes, shares
from t3.plan import Grid
from t3.processor import compile_blocks, install_t3

# Windows small enough that tiny grids have several, in every kind of layer.
PLAN = Plan("small", Grid(2, 8, 12), (("each", 1, 1), (1, 2, 3), (1, 4, 2), (2, 2, 3), (2, 1, 1)))
SMALL = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 256, "num_layers": 5, "text_dim": 32}


def transformer(seed=0, **config):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**SMALL, **config})
    for parameter in model.parameters():  # zero-initialised or constant ones would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in str(parameter) else 0.0, std=0.5)
    return model.eval()


def inputs(grid=(2, 8, 12), batch=1, channels=16, seed=1, **more):
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, channels, t, 2 * h, 2 * w, generator=generator),
        "timestep": torch.tensor([500.0] * batch),
        "encoder_hidden_states": torch.randn(batch, 512, 32, generator=generator),
        "return_dict": False,
        **more,
    }


@torch.no_grad()
def run(model, arguments):
    return model(**arguments)[0]


def rotate(x, rotary):
    """Rotary embedding as complex multiplication in float64: independent of the processor's way."""
    cos, sin = (table.double() for table in rotary)
    turn = torch.complex(cos[..., 0::2], sin[..., 0::2])
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def expected_attention(attn, hidden, rotary, grid, partition):
    """Self-attention of one block in float64, with the reference doing the windows."""

    def linear(layer, x):
        return x @ layer.weight.double().T + layer.bias.double()

    def rms(layer, x):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + layer.eps) * layer.weight.double()

    hidden = hidden.double()
    q, k = rms(attn.norm_q, linear(attn.to_q, hidden)), rms(attn.norm_k, linear(attn.to_k, hidden))
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, linear(attn.to_v, hidden)))
    out = t3_attention_reference(rotate(q, rotary), rotate(k, rotary), v, grid, partition)
    return linear(attn.to_out[0], out.flatten(2))


@pytest.mark.parametrize("kernels", [False, True], ids=["step by step", "from projections"])
@pytest.mark.parametrize("grid", [(2, 8, 12), (3, 5, 7), (1, 6, 6)])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_layer_equals_the_reference(monkeypatch, grid, batch, kernels):
    # On a CPU the kernels' ops are plain torch.
    monkeypatch.setattr(fused, "triton_usable", lambda device, dtype: kernels)
    model = transformer()
    install_t3(model, PLAN)
    seen = []

    def record(attn, args, output):
        seen.append((attn, args[0], args[3], output))

    hooks = [block.attn1.register_forward_hook(record) for block in model.blocks]
    run(model, inputs(grid, batch))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 5
    for layer, (attn, hidden, rotary, output) in enumerate(seen):
        expected = expected_attention(attn, hidden, rotary, grid, PLAN.partition(layer, grid))
        # float32 with unit roundoff 6e-8; each value sums 256 products twice over
        assert ((output.double() - expected).norm() / expected.norm()).item() < 2e-6


def test_differs_from_dense_and_is_dense_where_the_plan_says_so():
    model = transformer()
    arguments = inputs()
    dense = run(model, arguments)
    installed = install_t3(model, PLAN)
    with_t3 = run(model, arguments)
    assert ((with_t3 - dense).norm() / dense.norm()).item() > 1e-3
    installed.remove()
    assert not model._forward_pre_hooks and not any("forward" in vars(block) for block in model.blocks)
    assert torch.equal(run(model, arguments), dense)
    install_t3(model, Plan.preset("dense"), backend="sdpa")
    assert torch.equal(run(model, arguments), dense)


def test_only_the_layers_with_windows_change():
    """Up to the first windowed layer, every block's output is bit for bit that of dense attention."""
    model, arguments = transformer(), inputs()
    mixed = Plan("mixed", Grid(2, 8, 12), ((1, 1, 1), (1, 1, 1), (1, 2, 3), (1, 1, 1), (1, 1, 1)))

    def outputs():
        found = []
        hooks = [block.register_forward_hook(lambda m, a, out: found.append(out)) for block in model.blocks]
        run(model, arguments)
        for hook in hooks:
            hook.remove()
        return found

    dense = outputs()
    install_t3(model, mixed, backend="sdpa")
    windowed = outputs()
    assert [torch.equal(a, b) for a, b in zip(dense, windowed, strict=True)] == [True, True, False, False, False]


def test_any_size_without_installing_again():
    model, again = transformer(), transformer()
    install_t3(model, PLAN)
    for grid in ((2, 8, 12), (3, 5, 7), (2, 8, 12)):
        installed = install_t3(again, PLAN)
        assert torch.equal(run(model, inputs(grid)), run(again, inputs(grid)))
        installed.remove()


@torch.no_grad()
def test_latents_may_come_by_place():
    model, arguments = transformer(num_layers=2), inputs()
    install_t3(model, PLAN)
    named = run(model, arguments)
    latents = arguments.pop("hidden_states")
    assert torch.equal(model(latents, **arguments)[0], named)


def test_the_way_within_the_memory_is_taken_and_said_once():
    model, arguments, said = transformer(num_layers=2, num_attention_heads=4), inputs(), []
    shape = ModelShape.from_config(model.config).block(2 * 8 * 12, element=4)
    ways = shares(4)
    needed = [block_bytes(shape, way) - 2 * shape.tensor for way in ways]
    for least in dict.fromkeys(needed):
        said.clear()
        installed = install_t3(model, PLAN, memory=least, say=said.append)
        run(model, arguments)
        run(model, arguments)
        way = ways[needed.index(least)]
        assert model.blocks[1].attn1.processor.share == way
        assert said == [f"memory     {way}, for {least / 2**30:.3g} GiB of attention."]
        installed.remove()
    for word, way in (("fast", ways[0]), ("lean", ways[-1]), ("auto", ways[0]), (None, ways[0])):
        installed = install_t3(model, PLAN, memory=word)
        run(model, arguments)
        assert model.blocks[1].attn1.processor.share == way
        installed.remove()


def test_weights_that_are_still_to_come_need_room_too(monkeypatch):
    """As with offload: they lie elsewhere than the latents."""
    model, tokens = transformer(num_layers=2), 2 * 8 * 12
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    fast = activation_bytes(ModelShape.from_config(model.config), tokens, element=4)
    for device, room in (("meta", fast + weights), ("cpu", fast)):
        latents = torch.empty(1, 16, 2, 16, 24, device=device)
        for free, enough in ((room, True), (room - 1, False)):
            monkeypatch.setattr(processor, "free_bytes", lambda device, free=free: free)
            assert (processor._share(model, latents, tokens, "auto", None)[0] == Share()) == enough


def test_memory_bound_and_backend_change_nothing_that_matters():
    model, arguments = transformer(), inputs((3, 5, 7), 2)
    installed = install_t3(model, PLAN)
    plain = run(model, arguments)
    installed.remove()
    installed = install_t3(model, PLAN, memory=600_000)
    assert torch.equal(run(model, arguments), plain)
    installed.remove()
    install_t3(model, PLAN, backend="sdpa-math")
    # Five layers of float32 attention by two kernels that round differently.
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5


def test_batch_of_two_equals_two_alone():
    model, arguments = transformer(), inputs((3, 5, 7), 2)
    install_t3(model, PLAN)
    both = run(model, arguments)
    for i in range(2):
        alone = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        assert ((run(model, alone)[0] - both[i]).norm() / both[i].norm()).item() < 1e-5


def test_fused_projections_and_diffusers_backends(monkeypatch):
    model, arguments, asked = transformer(), inputs(), []

    def noting(*qkv, backend, **more):
        asked.append(backend)
        return dispatch_attention_fn(*qkv, backend=backend, **more)

    monkeypatch.setattr(processor, "dispatch_attention_fn", noting)
    install_t3(model, PLAN)
    plain = run(model, arguments)
    assert not asked
    model.set_attention_backend("native")
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5
    assert {name.value for name in asked} == {"native"}
    model.fuse_qkv_projections()
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5


def test_timesteps_per_token_and_image_to_video():
    per_token = transformer()
    install_t3(per_token, PLAN)
    arguments = inputs()
    plain = run(per_token, arguments)
    arguments["timestep"] = torch.full((1, 2 * 8 * 12), 500.0)
    assert ((run(per_token, arguments) - plain).norm() / plain.norm()).item() < 1e-5
    i2v = transformer(in_channels=36, image_dim=1280, added_kv_proj_dim=256)
    dense = run(i2v, image_arguments := inputs(channels=36, encoder_hidden_states_image=torch.randn(1, 257, 1280)))
    install_t3(i2v, PLAN)
    out = run(i2v, image_arguments)
    assert out.shape == dense.shape and torch.isfinite(out).all()
    assert ((out - dense).norm() / dense.norm()).item() > 1e-3


def test_gradients_flow():
    model = transformer()
    install_t3(model, PLAN)
    model(**inputs())[0].square().mean().backward()
    gradients = [block.attn1.to_q.weight.grad for block in model.blocks]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


def test_blocks_compile_without_a_graph_break():
    torch._dynamo.reset()
    model, arguments = transformer(), inputs((3, 5, 7))
    install_t3(model, PLAN, backend="sdpa")
    plain = run(model, arguments)
    compile_blocks(model, PLAN, backend="aot_eager")
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5


def test_compiled_blocks_hold_gelu_and_product_as_one(monkeypatch):
    """And give diffusers' own layer back when T3 is removed."""
    from t3 import feed_forward

    torch._dynamo.reset()
    monkeypatch.setattr(feed_forward, "_COMPILED_ON", ("cpu",))
    model, arguments = transformer(), inputs((3, 5, 7))
    installation = install_t3(model, PLAN, backend="sdpa")
    plain, called = run(model, arguments), []

    def backend(graph, example):
        called.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compile_blocks(model, PLAN, backend=backend)
    assert ((run(model, arguments) - plain).norm() / plain.norm()).item() < 1e-5
    assert all(sum("linear_gelu" in name for name in names) == 1 for names in called) and called
    assert all(sum("serve_text" in name for name in names) == 1 for names in called)
    installation.remove()
    assert all(type(block.ffn.net[0]) is GELU for block in model.blocks)
    assert all(type(block.attn2.processor) is WanAttnProcessor for block in model.blocks)


def test_compiled_blocks_learn():
    """Cross-attention too, whose operator has no gradients."""
    torch._dynamo.reset()
    model, plain, arguments = transformer(), transformer(), inputs((3, 5, 7))
    for each in (model, plain):
        install_t3(each, PLAN, backend="sdpa")
    compile_blocks(model, PLAN, backend="aot_eager")
    for each in (model, plain):
        each(**arguments)[0].square().mean().backward()
    pairs = zip(model.blocks, plain.blocks, strict=True)
    for one, two in ((getattr(b.attn2, name).weight.grad for b in pair) for pair in pairs for name in ("to_q", "to_v")):
        assert (one - two).norm() <= 1e-4 * two.norm() > 0


def test_blocks_of_one_partition_share_their_code():
    """Else a model of 30 blocks meets torch's limit."""
    torch._dynamo.reset()
    model, arguments = transformer(num_layers=10), inputs((3, 5, 7))
    install_t3(model, PLAN, backend="sdpa")
    graphs = []
    compile_blocks(model, PLAN, backend=lambda graph, example: graphs.append(graph) or graph.forward)
    run(model, arguments)
    assert len(graphs) == len(set(PLAN.layers))


def test_as_many_kinds_of_layers_compile_as_a_plan_has(monkeypatch):
    """torch gives up after a few; with `fullgraph` that is an error in the middle of sampling."""
    model, grid = transformer(num_layers=12), Grid(2, 8, 12)
    plan = Plan("many", grid, tuple((1, h, w) for h in (1, 2, 4) for w in (1, 2, 3, 4)))
    asked = []
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", lambda self, **options: asked.append(options))
    install_t3(model, plan)
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(model, plan, backend="aot_eager")
        assert torch._dynamo.config.recompile_limit >= 12
    assert asked == [{"fullgraph": True, "dynamic": False, "backend": "aot_eager"}]
    assert not any("forward" in vars(block) for block in model.blocks)
