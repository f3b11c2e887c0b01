"""The feed-forward layer: when its GELU may be fused, that it computes the same, and that nothing is clobbered."""

from __future__ import annotations

import contextlib
import copy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t3 import feed_forward as module
from t3.feed_forward import feed_forward, legal, trial

HALVES = [torch.float16, torch.bfloat16]


def layers(dtype=torch.float32, device="cpu", bias=True):
    torch.manual_seed(0)
    up, down = nn.Linear(24, 40, bias=bias), nn.Linear(40, 24)
    return up.to(device, dtype).requires_grad_(False), down.to(device, dtype).requires_grad_(False)


def expected(x, up, down):
    return down(F.gelu(up(x), approximate="tanh"))


@pytest.fixture
def trusted(monkeypatch):
    """The card's rules on the CPU: every device counts as a card whose fused product has passed its trial."""

    def on_card(up, x, lend=None):
        reason = module._not_plain(up, lend) or module._not_lent(up, x)
        calls.append(reason)
        return reason

    calls: list = []
    monkeypatch.setattr(module, "legal", on_card)
    monkeypatch.setattr(torch, "_addmm_activation", tanh_form)
    return calls


def tanh_form(bias, x, weight, use_gelu):
    assert use_gelu and x.ndim == 2
    return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")


def test_off_the_card_it_is_the_plain_layer(device):
    up, down = layers(device=device)
    x = torch.randn(2, 5, 24, device=device)
    before = x.clone()
    assert torch.equal(feed_forward(x, up, down), expected(x, up, down))
    assert torch.equal(x, before)
    assert "float32" in legal(up, x) if device == "cuda" else "needs an NVIDIA card, not cpu" in legal(up, x)


@pytest.mark.parametrize("dtype", HALVES)
def test_fused_on_the_card_is_no_worse_than_torch(device, dtype):
    """On a card: error to float64 at most twice that of separate steps, chunks and batch 2 included."""
    if device == "cpu":
        pytest.skip("no GPU")
    up, down = layers(dtype, device)
    for x in (torch.randn(2, 50, 24), torch.randn(1, 90, 24)[:, 7:61], torch.randn(24)):
        x = x.to(device, dtype)
        assert legal(up, x) is None
        exact = expected(x.double(), *(layer.double() for layer in layers(dtype, device)))
        ours, theirs = ((y.double() - exact).norm() for y in (feed_forward(x, up, down), expected(x, up, down)))
        assert ours <= 2 * theirs


@pytest.mark.parametrize("shape", [(2, 5, 24), (24,), (3, 24), (2, 9, 24)])
def test_fused_takes_any_leading_axes(trusted, shape):
    up, down = layers()
    x = torch.randn(shape)
    x = x[:, 2:7] if shape == (2, 9, 24) else x
    torch.testing.assert_close(feed_forward(x, up, down), expected(x, up, down))
    assert trusted == [None]


class Casting(nn.Linear):
    """ComfyUI's linear layer, by what is read of it."""

    comfy_cast_weights, weight_function, bias_function = False, (), ()

    def forward(self, x):
        return super().forward(x)

    def forward_comfy_cast_weights(self, x):
        return super().forward(x)


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """ComfyUI, as far as it matters here."""
    monkeypatch.setitem(sys.modules, "comfy.ops", SimpleNamespace(disable_weight_init=SimpleNamespace(Linear=Casting)))


class Doubling(Casting):
    def forward_comfy_cast_weights(self, x):
        return 2 * super().forward_comfy_cast_weights(x)


class Subclass(torch.Tensor):
    """As quantised weights are."""


def linear(kind=nn.Linear, bias=True, **attributes):
    made = kind(24, 40, bias=bias).requires_grad_(False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def hooked(register):
    made = linear()
    getattr(made, register)(lambda *a: None)
    return made


@contextlib.contextmanager
def lend(up, x):
    yield up.weight, up.bias


@pytest.mark.parametrize(
    ("up", "lend", "words"),
    [
        (linear(), None, None),
        (linear(Casting), None, None),
        (nn.utils.parametrizations.weight_norm(linear()).requires_grad_(False), None, None),
        (linear(Casting, comfy_cast_weights=True), None, "cast or patched at each call"),
        (linear(Casting, weight_function=[abs]), None, "cast or patched at each call"),
        (linear(Casting, bias_function=[abs]), None, "cast or patched at each call"),
        (linear(Casting, comfy_cast_weights=True), lend, None),
        (linear(Doubling, comfy_cast_weights=True), lend, "cast or patched at each call"),
        (linear(bias=False), None, "no bias"),
        (linear(forward=abs), None, "forward is replaced"),
        (hooked("register_forward_hook"), None, "hooks"),
        (hooked("register_forward_pre_hook"), None, "hooks"),
        (linear(type("Lora", (nn.Linear,), {"forward": lambda self, x: x})), None, "Lora is no plain linear layer"),
        (nn.Sequential(linear()), None, "Sequential is no plain linear layer"),
        (linear().half(), None, "float16 on cpu, and x is torch.float32"),
        (linear(weight=nn.Parameter(torch.randn(40, 24).as_subclass(Subclass), False)), None, "weights are Subclass"),
    ],
)
def test_what_is_no_plain_linear_layer_is_left_alone(up, lend, words):
    reason = module._not_plain(up, lend) or module._not_lent(up, torch.randn(2, 24))
    assert (reason is None) if words is None else (words in reason)


def test_lent_weights_are_used_and_given_back(trusted):
    up, down = linear(Casting, comfy_cast_weights=True), layers()[1]
    other, x, given_back = linear(), torch.randn(2, 5, 24), []

    @contextlib.contextmanager
    def lend(layer, on):
        assert layer is up and on is x
        yield lent
        given_back.append(True)

    lent = (other.weight, other.bias)
    torch.testing.assert_close(feed_forward(x, up, down, lend), expected(x, other, down))
    # Weights that turn out not to be dense: the same by separate steps.
    lent = (other.weight, None)
    torch.testing.assert_close(
        feed_forward(x, up, down, lend), down(F.gelu(F.linear(x, other.weight), approximate="tanh"))
    )
    assert given_back == [True, True]


def test_gelu_in_place_takes_no_second_tensor_and_nobody_s_values():
    x, seen, before, made = torch.randn(2, 5, 24), [], [], []
    down = layers()[1]
    down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].data_ptr()))

    class Layer(nn.Linear):
        def forward(self, x):
            made.append(super().forward(x))
            return made[-1]

    feed_forward(x, Layer(24, 40).requires_grad_(False), down)
    assert seen == [made[0].data_ptr()]
    # What another's forward kept stays as it was.
    up = layers()[0]
    up.forward = lambda x: made.append(F.linear(x, up.weight, up.bias)) or made[-1]
    feed_forward(x, up, down)
    assert torch.equal(made[1], F.linear(x, up.weight, up.bias))
    # What a hook kept stays as it was.
    hooked = layers()[0]
    hooked.register_forward_hook(lambda _, __, out: before.append((out, out.clone())))
    feed_forward(x, hooked, down)
    assert torch.equal(*before[0])
    # So does an input that the layer hands through.
    y = torch.randn(2, 5, 40)
    kept = y.clone()
    feed_forward(y, nn.Identity(), down)
    assert torch.equal(y, kept)


def test_gradients_go_the_plain_way():
    up, down = (layer.requires_grad_() for layer in layers())
    x = torch.randn(2, 5, 24, requires_grad=True)
    feed_forward(x, up, down).sum().backward()
    found, x.grad = x.grad, None
    expected(x, up, down).sum().backward()
    assert torch.equal(found, x.grad) and up.weight.grad is not None


@pytest.mark.parametrize("dtype", HALVES)
def test_the_trial_tells_right_from_wrong(dtype):
    cpu = torch.device("cpu")

    def form(approximate, off=0.0):
        def fused(bias, x, weight, use_gelu):
            z = bias.float() + x.float() @ weight.float()
            return (F.gelu(z, approximate=approximate) * (1 + off)).to(x.dtype)

        return fused

    def broken(*_, **__):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    assert trial(cpu, dtype, form("tanh")) is None
    assert "another form of GELU" in trial(cpu, dtype, form("none"))
    assert "times as far off" in trial(cpu, dtype, form("tanh", 0.1))
    assert "times as far off" in trial(cpu, dtype, form("tanh", torch.nan))
    assert "fails (CUBLAS_STATUS_NOT_SUPPORTED)" in trial(cpu, dtype, broken)
    # torch's own on the CPU has the exact form: the reason why this is for cards only.
    assert "another form of GELU" in trial(cpu, dtype)


def test_a_failed_trial_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "_checked", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "trial", lambda *_: "it is wrong")
    for _ in range(2):
        assert module._not_trusted(torch.device("cpu"), torch.float16) == "it is wrong"
    assert caplog.text.count("GELU stays beside the matrix product on cpu: it is wrong.") == 1
    monkeypatch.setattr(module, "_checked", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in module._not_trusted(torch.device("cpu"), torch.float16)
    assert not module._checked


@pytest.mark.parametrize(
    ("up", "one"),
    [
        (linear(), True),
        (linear(Casting), True),
        (linear(Casting, comfy_cast_weights=True), False),
        (linear(type("Lora", (nn.Linear,), {"forward": nn.Linear.forward}), bias=False), False),
        (hooked("register_forward_hook"), False),
    ],
)
def test_compiled_code_holds_it_as_one_operator(monkeypatch, up, one):
    """Whole, without a break, and as far from float64 as separate steps are; another kind of layer goes as it is."""
    torch._dynamo.reset()
    monkeypatch.setattr(module, "_COMPILED_ON", ("cpu",))
    up, down = copy.deepcopy(up).bfloat16(), layers(torch.bfloat16)[1]
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    graphs = []

    def backend(graph, example):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    with torch.no_grad():
        found = torch.compile(partial(feed_forward, up=up, down=down), fullgraph=True, backend=backend)(x)
        exact = expected(x.double(), *(copy.deepcopy(layer).double() for layer in (up, down)))
        ours, theirs = ((y.double() - exact).norm() for y in (found, expected(x, up, down)))
    assert len(graphs) == 1 and any("linear_gelu" in name for name in graphs[0]) == one
    assert ours <= 2 * theirs


def test_compiled_code_that_learns_or_is_hooked_takes_no_operator(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(module, "_COMPILED_ON", ("cpu",))
    monkeypatch.setattr(module, "_linear_gelu", None)
    up, down = layers()
    x = torch.randn(2, 5, 24)
    compiled = torch.compile(feed_forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.requires_grad_(), up, down), expected(x, up, down))
    compiled(x, up, down).sum().backward()
    assert x.grad.abs().max() > 0
    up.forward = partial(F.linear, weight=up.weight * 2, bias=up.bias)
    torch.testing.assert_close(compiled(x.detach(), up, down), expected(x.detach(), up.forward, down))


@pytest.mark.parametrize("shape", [(2, 5, 24), (24,), (1, 7, 24)])
def test_the_operator_computes_and_says_what_it_gives(device, shape):
    up, _ = layers(torch.bfloat16 if device == "cuda" else torch.float32, device)
    x = torch.randn(shape, device=device, dtype=up.weight.dtype)
    torch.library.opcheck(module._linear_gelu, (x, up.weight, up.bias))
    theirs = F.gelu(up(x), approximate="tanh")
    torch.testing.assert_close(module._linear_gelu(x, up.weight, up.bias), theirs)
