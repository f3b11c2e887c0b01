"""Every Wan variant ComfyUI has: T3 knows where the video lies in its tokens, or the variant runs dense and says so."""

from __future__ import annotations

import logging

import host_models
import pytest
import torch
from host_runs import forward, with_t3

# Kind and conditions, with the tokens that stand before and after the video's (6 x 6 x 5, from 6 x 12 x 10 latents).
FRAME = 6 * 5
VARIANTS = {
    ("t2v", ""): (0, 0),
    ("t2v", "appended frames"): (0, FRAME),
    ("t2v", "context"): (0, FRAME + 4 * 3),
    ("ti2v-5b", ""): (0, 0),
    ("i2v", "image"): (0, 0),
    ("flf2v", "first and last image"): (0, 0),
    ("fun-control", "fun reference"): (FRAME, 0),
    ("vace", "vace"): (0, 0),
    ("camera", "camera"): (0, 0),
    ("camera-2.2", "camera"): (0, 0),
    ("humo", ""): (0, 0),
    ("humo", "humo"): (0, 2 * FRAME),
    ("s2v", ""): (0, 0),
    ("s2v", "s2v"): (0, None),
    ("animate", "animate"): (0, 0),
    ("scail", "scail"): (2 * FRAME, 6 * 3 * 3),
    ("scail", "scail and frames"): (2 * FRAME, FRAME + 6 * 3 * 3),
    ("scail-2", "scail"): (2 * FRAME, 6 * 3 * 3),
    ("wandancer", "wandancer"): (0, 0),
    ("flow-rvs", ""): (0, 0),
}
LATENT = (6, 12, 10)


def test_no_variant_is_forgotten():
    """Kinds without a row above: the one that is refused."""
    assert set(host_models.KINDS) - {kind for kind, _ in VARIANTS} == {"causal-ar"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " with ".join(filter(None, v)))
def test_the_grid_is_where_the_video_is(pack, variant, caplog):
    kind, sort = variant
    before, after = VARIANTS[variant]
    patcher = host_models.patcher(kind)
    model = patcher.model.diffusion_model
    patched, report = with_t3(pack, patcher)
    generator = torch.Generator().manual_seed(5)
    conds = host_models.conditions(sort, model, 1, LATENT, generator)
    text = torch.randn(1, 7, model.text_dim, generator=generator)
    channels = model.out_dim
    x = torch.randn(1, channels, *LATENT, generator=generator)
    tokens, passes = [], []

    def watch(module, args, kwargs):
        tokens.append(args[0].clone())
        passes.append(module.__dict__["forward"].__self__.installation.current)

    hook = model.blocks[0].self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    with caplog.at_level(logging.WARNING):
        forward(patched, x, text=text, **conds)
        t, h, w = 4, 3, 2
        moved = x.clone()
        moved[:, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] += 1
        forward(patched, moved, text=text, **conds)
    hook.remove()

    layout = passes[0].layout
    assert layout.grid == (6, 6, 5)
    assert layout.prefix == before and layout.suffix == (None if kind == "s2v" else after)
    if after is not None:
        assert tokens[0].shape[1] == before + 6 * 6 * 5 + after
    # A changed patch of the video changes one token, there where T3 takes it to be.
    changed = (tokens[0] != tokens[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [before + (t * 6 + h) * 5 + w]
    assert "running those dense" not in caplog.text
    assert ("Every window attends them" in caplog.text) == bool(before + (after or 0))
    assert "5 self-attentions" in report or kind == "vace"


def test_a_model_with_attention_of_its_own_is_refused(pack):
    patcher = host_models.patcher("causal-ar")
    with pytest.raises(ValueError, match=r"CausalWanModel computes its self-attention in a way of its own"):
        with_t3(pack, patcher)
    assert not patcher.object_patches


def test_other_families_are_refused_in_words(pack):
    from types import SimpleNamespace

    import comfy.ldm.flux.model
    import comfy.ldm.lightricks.model
    import comfy.ldm.modules.diffusionmodules.openaimodel

    families = [
        comfy.ldm.flux.model.Flux,
        comfy.ldm.lightricks.model.LTXVModel,
        comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel,
    ]
    for family in families:
        model = family.__new__(family)
        patcher = SimpleNamespace(get_model_object=lambda name, model=model: model)
        with pytest.raises(ValueError, match=rf"works on Wan video models, and this one is a {family.__name__}"):
            with_t3(pack, patcher)


def test_tokens_in_unknown_places_run_dense_and_are_told(pack, caplog):
    """Another pack may add tokens T3 cannot know of: full attention over all, one line, the result of no T3."""
    import comfy.patcher_extension

    def add_frames(
        executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs
    ):
        return executor(x, timestep, context, clip_fea, x[:, :, :1], transformer_options, **kwargs)

    patcher = host_models.patcher("t2v").clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    patcher.add_wrapper_with_key(kind, "another pack", add_frames)
    patched, _ = with_t3(pack, patcher)
    x, text = torch.randn(1, 16, *LATENT), torch.randn(1, 7, 48)
    with caplog.at_level(logging.WARNING):
        out = forward(patched, x, text=text)
        forward(patched, x, text=text)
    assert caplog.text.count("running those dense") == 1
    assert torch.equal(out, forward(patcher, x, text=text))


def test_the_plan_layer_of_a_vace_block_is_that_of_the_block_it_joins(pack):
    patched, _ = with_t3(pack, host_models.patcher("vace"))
    layers = {
        path: patch.__self__.layer
        for path, patch in patched.object_patches.items()
        if "vace_blocks" in path and path.endswith("self_attn.forward")
    }
    assert layers == {f"diffusion_model.vace_blocks.{j}.self_attn.forward": i for j, i in enumerate((0, 3))}
    # Each block, its self-attention and its feed-forward; and RoPE.
    assert len(patched.object_patches) == 3 * (6 + 2) + 1


def test_a_part_of_another_kind_stays_dense_and_is_named(pack):
    """A block whose self-attention is a class of somebody's own: what that computes is not known here."""
    patcher = host_models.patcher("t2v")
    blocks = patcher.model.diffusion_model.blocks
    attn = blocks[1].self_attn
    attn.__class__ = type("SelfAttentionOfAnotherKind", (type(attn),), {})
    patched, report = with_t3(pack, patcher)
    assert "4 self-attentions" in report
    assert "Stay dense, being attention of another kind: blocks.1.self_attn." in report
    x, text = torch.randn(1, 16, *LATENT), torch.randn(1, 7, 48)
    kinds = []
    hooks = [
        block.self_attn.register_forward_pre_hook(lambda module, args: kinds.append("forward" in module.__dict__))
        for block in blocks
    ]
    assert torch.isfinite(forward(patched, x, text=text)).all()
    for hook in hooks:
        hook.remove()
    assert kinds == [True, False, True, True, True]
