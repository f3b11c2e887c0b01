"""A block by chunks of tokens and groups of heads is the host's own block, in the memory that is claimed for it."""

from __future__ import annotations

from functools import partial

import host_blocks
import host_models
import pytest
import torch
from host_blocks import DIM, FFN, GRID, HEADS, both, check, inputs, make_block, patch, random, randomised
from host_runs import forward as forward_pass
from host_runs import with_t3

SHARES = [(None, 1), (3, 1), (1, 1), (1, 2), (1, 3), (2, 2)]
CASES = {
    "plain": ({}, (2, 3, 2)),
    "batch of two": ({"batch": 2}, (2, 3, 2)),
    "frame windows": ({}, (4, 1, 1)),
    "local windows in place": ({"batch": 2}, (2, 1, 1)),
    "float32": ({"dtype": torch.float32}, (3, 2, 3)),
    "strided": ({"strided": True, "batch": 2}, (2, 3, 2)),
    "modulation per frame": ({"modulations": 4}, (1, 2, 3)),
    "modulation per token": ({"modulations": 168, "batch": 2}, (1, 2, 3)),
    "modulations of unequal length": ({"modulations": 5}, (1, 2, 3)),
    "tokens beside the grid": ({"prefix": 5, "suffix": 3, "batch": 2}, (2, 3, 2)),
}


@pytest.mark.parametrize("kernels", [False, True], ids=["plain torch", "kernels' ops"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_host_s_block(t3, monkeypatch, case, kernels):
    changes, partition = CASES[case]
    monkeypatch.setattr(t3.fused, "triton_usable", lambda device, dtype: kernels)
    dtype = changes.get("dtype", torch.float64)
    block, arguments = make_block(dtype=dtype), inputs(**changes)
    beside = {name: changes.get(name, 0) for name in ("prefix", "suffix")}
    for heads, parts in SHARES:
        share = t3.memory.Share(heads, parts)
        check(*both(t3, block, arguments, partition=partition, share=share, **beside)[:2])


def test_image_to_video(t3):
    check(*both(t3, make_block("i2v_cross_attn"), inputs(image=4, batch=2))[:2])


def test_a_dense_layer_goes_by_chunks_too(t3):
    """Self-attention is the host's, of all tokens at once; the rest is by chunks."""
    block, arguments = make_block(), inputs()
    seen = []
    hook = block.cross_attn.q.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    out, plain, ours = both(t3, block, arguments, partition=None)
    check(out, plain)
    assert seen == [32, 32, 32, 32, 32, 8, 168]
    ours.installation.current = None
    hook.remove()
    with torch.no_grad():
        check(ours.forward(**arguments, transformer_options={}), plain)


def test_vace(t3):
    import comfy.ldm.wan.model as wan
    import comfy.ops

    settings = {"operations": comfy.ops.disable_weight_init, "device": "cpu", "dtype": torch.float64}
    for number in (0, 1):
        block = wan.VaceWanAttentionBlock(
            "t2v_cross_attn", DIM, FFN, HEADS, cross_attn_norm=True, block_id=number, operation_settings=settings
        )
        arguments = inputs(batch=2)
        ours = patch(t3, randomised(block))
        stream = random(*arguments["x"].shape, seed=8)
        with torch.no_grad():
            found = ours.forward(stream, **arguments, transformer_options={})
            plain = type(block).forward(block, stream, **arguments, transformer_options={})
        for out, expected in zip(found, plain, strict=True):
            check(out, expected)


# --- What others put into a block ----------------------------------------------------------------------------------


def test_a_foreign_self_attention_gets_all_tokens(t3):
    block, arguments = make_block(), inputs()
    ours = patch(t3, block)
    seen = []

    def forward(x, freqs, transformer_options=None):
        seen.append(x.shape[1])
        return 0.5 * type(block.self_attn).forward(block.self_attn, x, freqs)

    block.self_attn.forward = forward
    with torch.no_grad():
        out = ours.forward(**arguments, transformer_options={})
        plain = type(block).forward(block, **arguments)
    check(out, plain)
    assert seen == [168, 168]


@pytest.mark.parametrize("lean", [False, True])
def test_a_foreign_cross_attention_gets_all_tokens_and_is_named(t3, lean, caplog):
    block, arguments = make_block(), inputs(batch=2)
    cross, seen = block.cross_attn, []

    def forward(x, context, context_img_len=None, transformer_options=None):
        seen.append(x.shape[1])
        return type(cross).forward(cross, x - x.mean(1, keepdim=True), context)

    cross.forward = forward
    out, plain, _ = both(t3, block, arguments, share=t3.memory.Share(1) if lean else None)
    check(out, plain)
    assert seen == [168, 168]
    assert f"cross-attention is that of {__name__}" in caplog.text


@pytest.mark.parametrize("lean", [False, True])
def test_an_attention_override_by_chunks_only_where_memory_is_short(t3, lean):
    seen = []

    def override(original, q, k, v, *args, **kwargs):
        options = kwargs["transformer_options"]
        if k.shape[1] == 9:
            seen.append((q.shape[1], "grid_sizes" in options))
        return original(q * 0.5, k, v, *args, **kwargs)

    options = {"optimized_attention_override": override, "grid_sizes": GRID}
    out, plain, _ = both(t3, make_block(), inputs(), options, share=t3.memory.Share(1) if lean else None)
    check(out, plain)
    assert seen[-1] == (168, True)
    assert seen[:-1] == ([(32, False)] * 5 + [(8, False)] if lean else [(168, True)])


def test_patches_that_read_and_change_tokens(t3):
    kept = []

    def reads_queries(args):
        assert args["q"].shape == (2, 168, HEADS, DIM // HEADS)
        return args["x"] + 0.1 * args["q"].flatten(2)

    def after_cross_attention(args):
        assert args["x"].shape == (2, 168, DIM)
        kept.append(out := args["x"] * 1.5)
        kept.append(out.clone())
        return out

    options = {"patches": {"attn1_patch": [reads_queries], "attn2_patch": [after_cross_attention]}}
    out, plain, _ = both(t3, make_block(), inputs(batch=2), options)
    check(out, plain)
    assert torch.equal(kept[0], kept[1]), "what a patch gave back was written to"


def test_a_feed_forward_of_another_kind_is_left_to_the_host(t3, monkeypatch):
    block, arguments = make_block(), inputs()
    block.ffn = torch.nn.Sequential(block.ffn[0], torch.nn.SiLU(), block.ffn[2])
    monkeypatch.setattr(t3.nodes.block, "_Pass", None)
    out, plain, _ = both(t3, block, arguments)
    assert torch.equal(out, plain)


def test_gradients_take_the_host_s_forward(t3):
    block, arguments = make_block(), inputs()
    block.requires_grad_(True)
    patch(t3, block).forward(**arguments, transformer_options={}).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (block.ffn[0].weight, block.self_attn.q.weight))


def test_a_foreign_block_is_named(pack, caplog):
    """Before T3 its forward stays, after T3 it wins; T3's self-attention runs inside it."""
    model = host_models.patcher("t2v")
    block = model.model.diffusion_model.blocks[1]

    def forward(*args, **kwargs):
        return 0.5 * type(block).forward(block, *args, **kwargs)

    before = model.clone()
    before.add_object_patch("diffusion_model.blocks.1.forward", forward)
    first, report = with_t3(pack, before)
    assert f"1 blocks keep the forward of {__name__}" in report
    second = with_t3(pack, model)[0].clone()
    second.add_object_patch("diffusion_model.blocks.1.forward", forward)
    x, text = torch.randn(1, 16, 6, 12, 12), torch.randn(1, 7, 48)
    outs = [forward_pass(patched, x, text=text) for patched in (first, second)]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], forward_pass(with_t3(pack, model)[0], x, text=text))
    assert f"1 blocks run the later forward of {__name__}" in caplog.text


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_clones_onto_fresh_weights_have_blocks_of_their_own(pack, kind, tmp_path):
    import comfy.sd

    path = host_models.write_dit(tmp_path / "dit.safetensors", kind)
    patched, _ = with_t3(pack, comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32}))
    clone = patched.clone(force_deepcopy=True)
    assert clone.model is not patched.model
    for part in pack.nodes.wan.blocks(clone.model.diffusion_model):
        patch = clone.object_patches[f"diffusion_model.{part.path}.forward"].__self__
        assert patch.module is part.module and patch.layer == part.layer


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_whole_models_by_chunks(t3, pack, monkeypatch, kind):
    """Through the host's own forward, wrappers of single blocks included."""
    seen = []

    def around(args, extra):
        seen.append(args["img"])
        kept = args["img"].clone()
        out = extra["original_block"](args)
        assert torch.equal(args["img"], kept)
        return out

    model = host_models.patcher(kind, num_layers=2).clone()
    model.set_model_patch_replace(around, "dit", "double_block", 1)
    generator = torch.Generator().manual_seed(4)
    diffusion_model = model.model.diffusion_model
    x = torch.randn(2, diffusion_model.out_dim, 6, 12, 12, generator=generator)
    text = torch.randn(2, 7, 48, generator=generator)
    conds = host_models.conditions("vace" if kind == "vace" else "", diffusion_model, 2, (6, 12, 12), generator)
    with monkeypatch.context() as whole:
        whole.setattr(t3.memory, "CHUNK_BYTES", 2**40)
        plain = forward_pass(with_t3(pack, model)[0], x, text=text, **conds)
    for mode in ("fast", "lean"):
        out = forward_pass(with_t3(pack, model, memory=mode)[0], x, text=text, **conds)
        assert (out - plain).norm() < 1e-5 * plain.norm()
    assert len(seen) == 3


@pytest.mark.parametrize("beside", [{}, {"prefix": 5, "suffix": 3}], ids=["alone", "tokens beside"])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain torch", "kernels' ops"])
def test_compiles_without_a_graph_break(t3, monkeypatch, kernels, beside):
    """Compiled, the block is whole. The host's default attention on a CPU breaks the graph by itself."""
    import comfy.ldm.modules.attention as attention

    monkeypatch.setattr("comfy.ldm.wan.model.optimized_attention", attention.attention_pytorch)
    monkeypatch.setattr(t3.fused, "triton_usable", lambda device, dtype: kernels)
    torch._dynamo.reset()
    block, arguments = make_block(dtype=torch.float32), inputs(dtype=torch.float32, **beside)
    ours = patch(t3, block, **beside)
    with torch.no_grad():
        expected = ours.forward(**arguments, transformer_options={})
        block.forward = ours.forward
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        out = compiled(**arguments, transformer_options={})
    assert (out - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("watched", [None, 0, 1], ids=["plain", "its product watched", "its GELU watched"])
def test_a_whole_block_has_the_host_s_feed_forward(t3, watched):
    """Of few tokens or compiled: the same numbers, with whatever others put into it."""
    block = make_block()
    x = random(2, 5, DIM, seed=9)
    expected = block.ffn(x)
    seen = []
    if watched is not None:
        block.ffn[watched].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    ours = t3.nodes.block.T3FeedForward(block.ffn, 0, None)
    block.ffn.forward = ours.forward
    check(block.ffn(x), expected)
    assert len(seen) == (watched is not None)
    if watched == 0:
        torch.testing.assert_close(seen[0], torch.nn.functional.linear(x, block.ffn[0].weight, block.ffn[0].bias))
    block.ffn[1] = torch.nn.SiLU()
    with_silu = torch.nn.Sequential.forward(block.ffn, x)
    assert torch.equal(block.ffn(x), with_silu) and (with_silu - expected).norm() > 1e-2 * expected.norm()


def test_compiled_blocks_hold_gelu_and_product_as_one(t3, monkeypatch):
    import comfy.ldm.modules.attention as attention

    monkeypatch.setattr("comfy.ldm.wan.model.optimized_attention", attention.attention_pytorch)
    monkeypatch.setattr(t3.feed_forward, "_COMPILED_ON", ("cpu",))
    torch._dynamo.reset()
    block, arguments = make_block(dtype=torch.float32), inputs(dtype=torch.float32)
    ours, called = patch(t3, block), []
    with torch.no_grad():
        expected = ours.forward(**arguments, transformer_options={})
        block.forward = ours.forward
        block.ffn.forward = t3.nodes.block.T3FeedForward(block.ffn, 0, None).forward

        def backend(graph, example):
            called.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        out = torch.compile(block, fullgraph=True, backend=backend)(**arguments, transformer_options={})
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    assert sum("linear_gelu" in name for name in called) == 1 and not any(name == "gelu" for name in called)


@pytest.mark.parametrize("whose", ["ours", "another node's", "dense"])
def test_compiled_blocks_attend_the_text_as_blocks_by_chunks_do(t3, monkeypatch, whose):
    """By what attends windows, as one operator, unless somebody chose an attention; a dense layer is the host's."""
    import comfy.ldm.modules.attention as attention

    monkeypatch.setattr("comfy.ldm.wan.model.optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    block, arguments = make_block(dtype=torch.float32), inputs(dtype=torch.float32)
    ours, called, seen = patch(t3, block, partition=None if whose == "dense" else (2, 3, 2)), [], []

    def override(original, *args, **kwargs):
        seen.append(args[1].shape[1])
        return original(*args, **kwargs)

    options = {"optimized_attention_override": override} if whose == "another node's" else {}
    with torch.no_grad():
        expected = ours.forward(**arguments, transformer_options=dict(options))
        block.forward = ours.forward
        seen.clear()

        def backend(graph, example):
            called.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        out = torch.compile(block, fullgraph=True, backend=backend)(**arguments, transformer_options=dict(options))
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    assert sum("serve_text" in name for name in called) == (whose != "another node's")
    assert bool(seen) == bool(options)
    if whose == "dense":
        assert sum("scaled_dot_product" in name for name in called) == 1


def test_a_foreign_feed_forward_stays_and_is_named(pack, caplog):
    """Put in by another node, before T3 or after it. Its blocks run whole, in more memory than T3 counts on."""
    model, key = host_models.patcher("t2v"), "diffusion_model.blocks.0.ffn.forward"

    def foreign(x):
        return x

    before = model.clone()
    before.add_object_patch(key, foreign)
    first, report = with_t3(pack, before)
    assert first.object_patches[key] is foreign
    assert f"1 blocks keep the feed-forward of {__name__}, run whole, and take the memory of that." in report
    patched = with_t3(pack, model)[0]
    assert pack.nodes.stand_in.is_ours(patched.object_patches[key])
    x, text = torch.randn(1, 16, 6, 12, 12), torch.randn(1, 7, 48)
    plain = forward_pass(patched, x, text=text)
    assert "feed-forward" not in caplog.text
    patched.add_object_patch(key, foreign)
    assert not torch.equal(forward_pass(patched, x, text=text), plain)
    assert f"1 blocks run the feed-forward of {__name__} whole, and take the memory of that." in caplog.text
    # And the node put on once more leaves it there.
    assert with_t3(pack, patched)[0].object_patches[key] is foreign


# --- Weights that the host makes anew at each call -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["stored in another dtype", "patched on the way"])
def test_weights_are_made_ready_once_a_block(t3, how, monkeypatch):
    import comfy.ops

    block = make_block(dtype=torch.float32, operations=comfy.ops.manual_cast)
    if how == "stored in another dtype":
        block = block.bfloat16()
    else:
        for module in (block.self_attn.v, block.self_attn.o, block.ffn[2]):
            module.weight_function = [lambda weight: weight * 1.25]
    arguments = inputs(dtype=torch.float32)
    made = []
    original = comfy.ops.cast_bias_weight
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, *a, **k: made.append(s) or original(s, *a, **k))
    for share in (t3.memory.Share(), t3.memory.Share(1, 2)):
        made.clear()
        ours = patch(t3, block, share=share)
        with torch.no_grad():
            out = ours.forward(**arguments, transformer_options={})
            counted = [made.count(m) for m in (block.self_attn.v, block.self_attn.o, block.ffn[2])]
            plain = type(block).forward(block, **arguments, transformer_options={})
        check(out, plain)
        assert counted == [1, 1, 1]


# --- Memory --------------------------------------------------------------------------------------------------------


def peak_bytes(work) -> int:
    """The most bytes that `work()` held at once beyond what was there, by the allocator's own events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


@pytest.mark.parametrize(("heads", "parts"), [(None, 1), (1, 1), (1, 4)])
def test_the_claimed_memory_is_the_memory_held(t3, monkeypatch, heads, parts):
    """Without kernels, whose stand-ins in plain torch hold more; fast is then as lean with all heads."""
    rows = 16
    monkeypatch.setattr(t3.memory, "CHUNK_BYTES", rows * FFN * 4)
    block = make_block(dtype=torch.float32)
    sizes = (8, 12, 14)
    monkeypatch.setattr(host_blocks, "GRID", sizes)
    arguments = inputs(dtype=torch.float32)
    share = t3.memory.Share(heads, parts)
    ours = patch(t3, block, partition=(4, 3, 3), share=share)
    tokens = sizes[0] * sizes[1] * sizes[2]
    shape = t3.memory.BlockShape(DIM, FFN, HEADS, 1, tokens, 4)
    with torch.no_grad():
        ours.forward(**arguments, transformer_options={})  # windows' indices are kept from the first call on
        most = peak_bytes(lambda: ours.forward(**arguments, transformer_options={}))
        plain = peak_bytes(lambda: type(block).forward(block, **arguments, transformer_options={}))
    claimed = t3.memory.block_bytes(shape, share if heads else t3.memory.Share(HEADS)) - shape.tensor
    # Beyond it: a chunk's rotation in plain torch, and what torch's own attention copies of the heads at work.
    slack = 12 * rows * DIM * 4 + shape.tensor * (heads or HEADS) / HEADS
    assert 0.6 * claimed <= most <= claimed + slack
    assert most < plain


@pytest.mark.parametrize("alike", [False, True], ids=["of its own kind", "of the host's kind"])
def test_a_feed_forward_module_of_another_node_stays(pack, alike):
    """The whole module is patched, not its forward, before T3: the new one runs, and goes when it is taken off."""

    class Halved(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 0.5 * self.inner(x)

    model, reference = host_models.patcher("t2v"), host_models.patcher("t2v")
    ffn = model.model.diffusion_model.blocks[0].ffn
    down = torch.nn.Linear(ffn[2].in_features, ffn[2].out_features)
    module = torch.nn.Sequential(ffn[0], ffn[1], down) if alike else Halved(ffn)
    x, text = torch.randn(1, 16, 6, 12, 12), torch.randn(1, 7, 48)
    reference.model.diffusion_model.blocks[0].ffn = module
    expected = forward_pass(with_t3(pack, reference)[0], x, text=text)
    other = model.clone()
    other.add_object_patch("diffusion_model.blocks.0.ffn", module)
    plain = forward_pass(model, x, text=text)
    assert torch.equal(forward_pass(with_t3(pack, other)[0], x, text=text), expected)
    assert torch.equal(forward_pass(model, x, text=text), plain)


def test_a_clone_onto_fresh_weights_has_feed_forwards_of_its_own(pack, tmp_path):
    """Also in blocks whose forward another node patched after T3."""
    import comfy.sd
    from comfy.patcher_extension import CallbacksMP

    path = host_models.write_dit(tmp_path / "dit.safetensors")
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})

    def patch_blocks(_, patcher):
        for i, block in enumerate(patcher.model.diffusion_model.blocks):
            patcher.add_object_patch(f"diffusion_model.blocks.{i}.forward", partial(type(block).forward, block))

    patched = with_t3(pack, model)[0].clone()
    patch_blocks(None, patched)
    patched.add_callback_with_key(CallbacksMP.ON_CLONE, "another pack", patch_blocks)
    x, text = torch.randn(1, 16, 6, 12, 12), torch.randn(1, 7, 48)
    expected = forward_pass(patched, x, text=text)
    fresh = patched.clone(force_deepcopy=True)
    for i, block in enumerate(fresh.model.diffusion_model.blocks):
        assert fresh.object_patches[f"diffusion_model.blocks.{i}.ffn.forward"].__self__.module is block.ffn
    # The first model, whose weights the copy must not need.
    del model, patched, patch_blocks
    assert torch.equal(forward_pass(fresh, x, text=text), expected)
