"""One block of the host's, small and random, with T3 in its place as in the middle of a forward pass.

`t3`, which some take, is the fixture of that name.
"""

from __future__ import annotations

import sys

import torch

GRID, HEADS, DIM, FFN = (4, 6, 7), 4, 64, 160
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_block(kind="t2v_cross_attn", dtype=torch.float64, operations=None):
    """A block of the host's with random weights that matter everywhere."""
    import comfy.ldm.wan.model as wan
    import comfy.ops

    settings = {"operations": operations or comfy.ops.disable_weight_init, "device": "cpu", "dtype": dtype}
    block = wan.WanAttentionBlock(kind, DIM, FFN, HEADS, cross_attn_norm=True, operation_settings=settings)
    return randomised(block)


def randomised(block):
    with torch.no_grad():
        for seed, (name, weight) in enumerate(block.named_parameters()):
            noise = random(*weight.shape, seed=seed)
            scale = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.3
            weight.copy_(noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return block.requires_grad_(False)


def inputs(batch=1, prefix=0, suffix=0, modulations=None, strided=False, dtype=torch.float64, image=0):
    tokens = prefix + suffix + GRID[0] * GRID[1] * GRID[2]
    x = random(batch, tokens, DIM, seed=1, dtype=dtype)
    if strided:  # as the host's patch embedding leaves it
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    e = random(*((batch, 6, DIM) if modulations is None else (batch, modulations, 6, DIM)), seed=2, dtype=dtype)
    angle = random(1, tokens, 1, DIM // HEADS // 2, seed=3) * 3
    freqs = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    context = random(batch, 9 + image, DIM, seed=4, dtype=dtype)
    return {"x": x, "e": e * 0.3, "freqs": freqs.to(dtype), "context": context, "context_img_len": image}


def patch(t3, block, partition=(2, 3, 2), share=None, prefix=0, suffix=0, backend="sdpa"):
    """Ours for this block, as in the middle of a forward pass; its self-attention is patched too.

    backend: a name, a backend, or None: the host's attention, as where the user chose it.
    """
    pack, nodes = t3.pack, t3.nodes
    parts = sys.modules[f"{pack.__name__}.t3"]
    grid = parts.Grid(*GRID)
    current = nodes.forward_pass.ForwardPass(
        layout=nodes.wan.Layout(grid, prefix, suffix),
        partitions=(None if partition is None else parts.Partition(*partition),),
        backend=sys.modules[f"{pack.__name__}.t3.backends"].BACKENDS.get(backend, backend),
        share=share or t3.memory.Share(),
        memory=None,
    )
    installation = nodes.patch.Installation(settings=None, current=current)
    block.self_attn.forward = nodes.patch.T3SelfAttention(block.self_attn, 0, installation).forward
    kind = nodes.block.T3VaceBlock if hasattr(block, "after_proj") else nodes.block.T3Block
    return kind(block, 0, installation)


@torch.no_grad()
def both(t3, block, arguments, options=None, **how):
    """`(ours, the host's own forward with T3's self-attention of all tokens, the stand-in)`."""
    ours = patch(t3, block, **how)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    out = ours.forward(**arguments, transformer_options=options or {})
    assert all(torch.equal(arguments[name], value) for name, value in before.items()), "an input was written to"
    plain = type(block).forward(block, **arguments, transformer_options=options or {})
    return out, plain, ours


def check(out, plain):
    assert out.shape == plain.shape and out.dtype == plain.dtype
    assert (out - plain).norm() <= TOLERANCE[plain.dtype] * plain.norm()
