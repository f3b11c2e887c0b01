"""With T3 Attention the host's Wan models compute our float64 reference, layer by layer; with one window, their own."""

from __future__ import annotations

from dataclasses import dataclass

import host_models
import pytest
import torch
from host_models import rotate
from host_runs import forward, plan_of, with_t3

from t3 import Grid, Plan
from t3.kernels.attention.naive import t3_attention_reference


@dataclass
class Case:
    """Latents `[B, C, T, H, W]`, the host's conditions beside them, and how many tokens stand before and after."""

    kind: str
    latent: tuple[int, int, int]
    batch: int = 1
    prefix: int = 0
    suffix: int = 0
    conds: str = ""

    def __str__(self):
        return f"{self.kind} {'x'.join(map(str, self.latent))} batch {self.batch} {self.conds}".strip()


CASES = [
    Case("t2v", (6, 12, 12)),
    Case("t2v", (6, 12, 12), batch=2),
    Case("t2v", (5, 14, 10)),
    Case("t2v", (5, 13, 9), batch=2),
    Case("ti2v-5b", (3, 12, 10)),
    Case("i2v", (6, 12, 12), conds="image"),
    Case("i2v", (5, 14, 10), batch=2, conds="image"),
    Case("flf2v", (3, 12, 10), conds="first and last image"),
    Case("vace", (6, 12, 12), conds="vace"),
    Case("vace", (5, 14, 10), batch=2, conds="vace"),
    Case("fun-control", (3, 12, 10), prefix=30, conds="fun reference"),
    Case("t2v", (3, 12, 10), suffix=30, conds="appended frames"),
    Case("t2v", (3, 12, 10), batch=2, suffix=42, conds="context"),
    Case("camera", (3, 12, 10), conds="image"),
]


def reference(attn, x, freqs, grid, partition, prefix, dtype):
    """`WanSelfAttention` by its formulas, with T3 by definition, in `dtype`."""

    def linear(layer):
        return x.to(dtype) @ layer.weight.to(dtype).T + layer.bias.to(dtype)

    def normed(y, norm):
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + attn.eps) * norm.weight.to(dtype)

    split = (*x.shape[:2], attn.num_heads, attn.head_dim)
    q = rotate(normed(linear(attn.q), attn.norm_q).view(split), freqs.to(dtype))
    k = rotate(normed(linear(attn.k), attn.norm_k).view(split), freqs.to(dtype))
    out = t3_attention_reference(q, k, linear(attn.v).view(split), grid, partition, prefix=prefix).to(dtype)
    return out.flatten(2) @ attn.o.weight.to(dtype).T + attn.o.bias.to(dtype)


@pytest.mark.parametrize("kernels", [False, True], ids=["step by step", "from projections"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_self_attention_is_the_reference(pack, monkeypatch, case, kernels):
    made = take_kernels(pack, monkeypatch) if kernels else []
    generator = torch.Generator().manual_seed(3)
    patcher = host_models.patcher(case.kind)
    model = patcher.model.diffusion_model
    patched, _ = with_t3(pack, patcher)
    plan = Plan("test", (6, 6, 6), plan_of(pack).layers)
    grid = Grid(case.latent[0], -(-case.latent[1] // 2), -(-case.latent[2] // 2))
    seen = []

    def record(layer, attn):
        return lambda module, args, kwargs, out: seen.append((layer, attn, args[0].clone(), _freqs(args, kwargs), out))

    hooks = [
        b.self_attn.register_forward_hook(record(i, b.self_attn), with_kwargs=True) for i, b in enumerate(model.blocks)
    ]
    for layer, j in getattr(model, "vace_layers_mapping", {}).items():
        attn = model.vace_blocks[j].self_attn
        hooks.append(attn.register_forward_hook(record(layer, attn), with_kwargs=True))
    x = torch.randn(case.batch, model.out_dim, *case.latent, generator=generator)
    text = torch.randn(case.batch, 7, model.text_dim, generator=generator)
    out = forward(
        patched, x, text=text, **host_models.conditions(case.conds, model, case.batch, case.latent, generator)
    )
    for hook in hooks:
        hook.remove()

    assert out.shape == x.shape and torch.isfinite(out).all()
    assert len(seen) == len(hooks)
    assert len(made) == (len(seen) if kernels else 0)
    for layer, attn, tokens, freqs, attended in seen:
        assert tokens.shape[1] == case.prefix + grid.tokens + case.suffix
        where = (attn, tokens, freqs, grid, plan.partition(layer, grid), case.prefix)
        truth = reference(*where, torch.float64)
        # float32 done plainly, with the attention itself in float64: what rounding the rest costs at least.
        plain = (reference(*where, torch.float32) - truth).norm()
        assert (attended - truth).norm() <= 4 * plain
        dense = reference(attn, tokens, freqs, grid, (1, 1, 1), case.prefix, torch.float64)
        assert (dense - truth).norm() > 0.05 * truth.norm()


def take_kernels(pack, monkeypatch) -> list:
    """Have blocks go the way of the kernels, whose ops are plain torch on a CPU. Gives a list of those that did."""
    made, projections = [], pack.nodes.projections
    attend = projections.attend
    monkeypatch.setattr(f"{pack.__name__}.t3.fused.triton_usable", lambda device, dtype: True)
    monkeypatch.setattr(projections, "attend", lambda attn, *args: made.append(attn) or attend(attn, *args))
    return made


def _freqs(args, kwargs):
    return kwargs["freqs"] if "freqs" in kwargs else args[1]


@pytest.mark.parametrize("kind", ["t2v", "vace", "i2v"])
def test_one_window_is_the_host_itself(pack, kind):
    generator = torch.Generator().manual_seed(4)
    patcher = host_models.patcher(kind)
    model = patcher.model.diffusion_model
    case = Case(kind, (3, 8, 6), batch=2, conds={"vace": "vace", "i2v": "image"}.get(kind, ""))
    x = torch.randn(2, 16, *case.latent, generator=generator)
    inputs = {
        "text": torch.randn(2, 7, model.text_dim, generator=generator),
        **host_models.conditions(case.conds, model, case.batch, case.latent, generator),
    }
    plain = forward(patcher, x, **inputs)
    for changes in ({"custom_plan": plan_of(pack, [[1, 1, 1]])}, {"custom_plan": None, "plan": "dense"}):
        patched, _ = with_t3(pack, patcher, **changes)
        assert torch.equal(forward(patched, x, **inputs), plain)
    cut, _ = with_t3(pack, patcher)
    assert not torch.allclose(forward(cut, x, **inputs), plain, atol=1e-3)
    assert torch.equal(forward(patcher, x, **inputs), plain), "the original model was changed"
