"""The losses and their gradients against references written out here, with masked dense attention in float64."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from retrofit_fixtures import PLAN, TINY

from t3 import Grid, Plan
from t3.retrofit.config import Stage, Trainable
from t3.retrofit.objectives import LOSSES, Batch, Objective
from t3.retrofit.operator import Operator, install
from t3.retrofit.teacher import Teacher
from t3.retrofit.trainable import make_trainable, trained

GRID = Grid(2, 3, 4)
ROWS = torch.tensor([0, 5, 6, 17, 23])


class Masked:
    """Self-attention by the definition: q, k, v normed and rotated, dense attention under a mask, branches' mean."""

    def __init__(self, masks):
        self.masks = masks

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        cos, sin = (table[..., 0::2] for table in rotary_emb)
        turn = torch.complex(cos, sin)
        q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2) for y in (q, k))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        outs = [torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~m, -torch.inf).softmax(-1), v) for m in self.masks]
        return attn.to_out[0](torch.stack(outs).mean(0).flatten(2))


def layer_masks(partition):
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    places = [x.flatten() for x in (t, h, w)]
    local = [
        torch.tensor([list(part).index(True) for part in _blocks(x, n, length)])
        for x, n, length in zip(places, partition, GRID, strict=True)
    ]
    strided = [x % n for x, n in zip(places, partition, strict=True)]
    return [sum((a[:, None] != a[None]).int() for a in own) == 0 for own in (local, strided)]


def _blocks(x, count, length):
    return [[bool((part == value).any()) for part in torch.arange(length).tensor_split(count)] for value in x]


def tiny(**changes):
    torch.manual_seed(3)
    return WanTransformer3DModel(**{**TINY, **changes}).double().train()


def batch(seed=1):
    torch.manual_seed(seed)
    latents, noise = (torch.randn(2, 16, 2, 6, 8, dtype=torch.float64) for _ in range(2))
    text = torch.randn(2, 5, 8, dtype=torch.float64)
    return Batch(latents, text, noise, torch.tensor([0.3, 0.8], dtype=torch.float64), ROWS)


def objective(stage, what=None):
    model, operator = tiny(), Operator(Plan.from_json(PLAN))
    if what is not None:
        make_trainable(model, what, torch.float64)
        model.double()
    install(model, operator)
    teacher = Teacher(model, operator, shared=what is not None, dtype=torch.float64) if stage.teaches else None
    if what is not None:
        # A LoRA starts at nothing; what it would learn must be told from the teacher.
        for parameter in trained(model).values():
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return Objective(model, operator, teacher, torch.float64)


def mask_model(model, dense=False):
    """The same weights with the reference attention; keeps what each layer gets and gives."""
    plan, seen = Plan.from_json(PLAN), []
    for i, block in enumerate(model.blocks):
        masks = [torch.ones(24, 24, dtype=torch.bool)] if dense else layer_masks(plan.partition(i, GRID))
        block.attn1.set_processor(Masked(masks))
        block.attn1.register_forward_hook(lambda module, given, out: seen.append((given[0], given[3], out)))
    return model, seen


def velocity(model, b):
    sigma = b.sigma.view(-1, 1, 1, 1, 1)
    mixed = (1 - sigma) * b.latents + sigma * b.noise
    return model(mixed, 1000 * b.sigma, b.text, return_dict=False)[0]


def mse(a, b):
    return ((a - b) ** 2).mean()


def expected_losses(b, inputs, base):
    """By the definitions at the top of `objectives`; `base` makes the reference's weights."""
    student, own = mask_model(base())
    dense, given = mask_model(tiny(), dense=True)
    v, target = velocity(student, b), velocity(dense, b).detach()
    flow, agreement = mse(v, b.noise - b.latents), mse(v, target)
    errors = []
    for i in range(len(student.blocks)):
        x, rotary, a_dense = given[i]
        if inputs == "teacher":
            a = student.blocks[i].attn1(x.detach(), None, None, rotary)
        else:
            x, rotary, a = own[i]
            a_dense = dense.blocks[i].attn1(x.detach(), None, None, rotary)
        a_dense = a_dense[:, ROWS].detach()
        errors.append(mse(a[:, ROWS], a_dense) / (a_dense**2).mean())
    return student, dict(zip(LOSSES, (flow, agreement, sum(errors) / len(errors)), strict=True))


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("only", LOSSES)
def test_each_loss_and_its_gradients(only, inputs):
    stage = Stage(**{**dict.fromkeys(LOSSES, 0.0), only: 0.7}, inputs=inputs)
    ours = objective(stage)
    b = batch()
    total, parts = ours(b, stage)
    student, expected = expected_losses(b, inputs, tiny)
    torch.testing.assert_close(total.double(), 0.7 * expected[only], rtol=1e-5, atol=0)
    assert [name for name, part in zip(LOSSES, parts, strict=True) if not part.isnan()] == [only]
    total.backward()
    (0.7 * expected[only]).backward()
    found = dict(ours.transformer.named_parameters())
    size = max(p.grad.abs().max() for p in student.parameters() if p.grad is not None)
    for name, parameter in student.named_parameters():
        grad = found[name].grad
        if parameter.grad is None:
            assert grad is None or not grad.any(), name
        else:
            # The library's norms and residuals are float32, whatever the weights are.
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6 * float(size), msg=name)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_a_lora_learns_from_the_model_without_it(inputs):
    stage = Stage(flow=0.5, velocity=2.0, attention=3.0, inputs=inputs)
    what = Trainable(what="lora", rank=2, also=("norms", "biases", "modulation"))
    ours = objective(stage, what)

    def tuned():
        """The reference model with the adapters' product added, and the small tensors as they are."""
        model, weights = tiny(), dict(ours.transformer.named_parameters())
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.default.weight" in weights:
                up, down = (weights[f"{stem}.lora_{x}.default.weight"] for x in "BA")
                parameter.data = (parameter + up @ down).detach()
            else:
                parameter.data = (
                    weights.get(name, weights.get(name.replace(".bias", ".base_layer.bias"))).detach().clone()
                )
        return model

    b = batch()
    before = {name: p.detach().clone() for name, p in ours.transformer.named_parameters()}
    total, parts = ours(b, stage)
    _, expected = expected_losses(b, inputs, tuned)
    for name, part in zip(LOSSES, parts, strict=True):
        torch.testing.assert_close(part.double(), expected[name].detach(), rtol=1e-5, atol=0, msg=name)
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(ours).values())
    assert all(torch.equal(p, before[name]) for name, p in ours.transformer.named_parameters())


def test_gradient_checkpointing_changes_nothing():
    for inputs in ("teacher", "student"):
        stage = Stage(velocity=1.0, attention=1.0, inputs=inputs)
        grads = []
        for checkpointing in (False, True):
            ours = objective(stage)
            if checkpointing:
                ours.transformer.enable_gradient_checkpointing()
            ours(batch(), stage)[0].backward()
            grads.append([p.grad for p in ours.transformer.parameters()])
        for a, c in zip(*grads, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-9)


def test_what_is_trained():
    names = {}
    for asked in (
        Trainable(),
        Trainable(what="lora", rank=3, targets=("self-attention",)),
        Trainable(what="lora", rank=3, targets=("ffn",), also=("norms",)),
        Trainable(what="lora", also=("biases", "modulation")),
    ):
        model = tiny()
        make_trainable(model, asked, torch.bfloat16)
        names[asked] = set(trained(model))
        assert all(p.dtype == torch.float32 for p in trained(model).values())
    everything, attention, norms, small = names.values()
    assert everything == set(dict(tiny().named_parameters()))
    assert {n.split(".lora")[0].split(".", 2)[2] for n in attention} == {
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
    }
    assert {n.split(".", 2)[2] for n in norms if "lora" not in n} == {
        f"attn{i}.norm_{x}.weight" for i in (1, 2) for x in "qk"
    }
    assert {n.split(".", 2)[2].split(".lora")[0] for n in norms if "lora" in n} == {"ffn.net.0.proj", "ffn.net.2"}
    plain = {n.replace(".base_layer", "") for n in small if "lora" not in n}
    assert plain == {
        n for n in everything if (n.startswith("blocks.") and n.endswith(".bias")) or n.endswith("scale_shift_table")
    }


@pytest.mark.slow
def test_compiled_blocks_without_a_graph_break_give_the_same_gradients():
    from t3.processor import compile_blocks

    stage, grads = Stage(), []
    for compiled in (False, True):
        ours = objective(stage)
        ours.operator.mean = torch.tensor(0.4)
        if compiled:
            compile_blocks(ours.transformer, ours.operator.plan, backend="eager")
        for _ in range(2):  # the second by what the first compiled
            ours(batch(), stage)[0].backward()
        grads.append([p.grad for p in ours.transformer.parameters()])
    for a, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-9)
