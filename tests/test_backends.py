"""Which backend serves which tensors, and that each one present computes attention."""

import dataclasses

import pytest
import torch

from t3.backends import BACKENDS, Situation, auto_order, choice, choose, explain, registry
from t3.errors import T3Error
from t3.kernels.attention.naive import dense_attention

CPU = Situation(torch.device("cpu"), torch.float32, 64)


def test_auto_on_a_cpu_is_sdpa_and_says_why():
    backend, why = choose("auto", CPU)
    assert backend.name == "sdpa"
    assert "float32, head size 64, on cpu" in why


def test_every_backend_is_explained():
    verdicts = explain(CPU)
    assert set(verdicts) == set(BACKENDS)
    assert verdicts["sdpa"] == verdicts["sdpa-math"] == "usable"
    assert verdicts["sdpa-cudnn"] == "needs cuda, not cpu"


def test_an_illegal_choice_names_the_reason_and_the_legal_ones():
    with pytest.raises(T3Error, match="'sage' cannot be used for float32.*needs cuda.*Usable here: sdpa, sdpa-math"):
        choose("sage", CPU)


@dataclasses.dataclass(frozen=True)
class Card(Situation):
    """A situation on a card that is not there."""

    card: tuple[int, int] = (9, 0)

    @property
    def capability(self):
        return self.card


def on_card(**changes):
    return Card(**{"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, **changes})


@pytest.mark.parametrize(
    ("name", "situation", "words"),
    [
        ("sdpa-cudnn", on_card(dtype=torch.float32), "takes float16, bfloat16, not torch.float32"),
        ("sdpa-cudnn", on_card(card=(7, 5)), "needs compute capability 8.0, this card has 7.5"),
        ("sdpa-flash", on_card(head_dim=384), "up to 256 in steps of 8, not 384"),
        ("flash-attn-2", on_card(head_dim=100), "up to 256 in steps of 8, not 100"),
        ("sage", on_card(head_dim=80), "takes head sizes 64, 96, 128, not 80"),
        ("sage", on_card(needs_grad=True), "has no gradients"),
        ("sage", on_card(windows=(1_344, 2_142)), "wrong for 2,142 keys: it needs a multiple of 64"),
        ("sage", on_card(windows=(1_344,)), None),
        ("flash-attn-3", on_card(card=(8, 9)), "needs compute capability 9.0, this card has 8.9"),
        ("flash-attn-3", on_card(card=(10, 0)), "ends at compute capability 9.0, this card has 10.0"),
        ("flash-attn-3", on_card(), None),
        ("flash-attn-4", on_card(), "flash_attn.cute is not installed"),
        ("sdpa-cudnn", on_card(), None),
    ],
)
def test_stated_constraints(monkeypatch, name, situation, words):
    installed = {"sageattention", "flash_attn_interface"}
    monkeypatch.setattr(registry, "version", lambda package: "1.0.6")
    registry._sage_keys_multiple.cache_clear()
    monkeypatch.setattr(registry, "installed", lambda package: package in installed or name == "flash-attn-2")
    monkeypatch.setattr(registry, "_torch_allows", lambda check, s: True)
    reason = BACKENDS[name].refusal(situation)
    registry._sage_keys_multiple.cache_clear()
    assert (reason is None) if words is None else (words in reason)


def test_auto_order_by_card(monkeypatch):
    monkeypatch.setattr(registry, "installed", lambda package: True)
    monkeypatch.setattr(registry, "_torch_allows", lambda check, s: True)
    choice._remembered.cache_clear()
    assert choose("auto", on_card())[0].name == "sdpa-cudnn"
    assert choose("auto", on_card(card=(8, 6)))[0].name == "sdpa-flash"
    backend, why = choose("auto", on_card(dtype=torch.float32))
    assert backend.name == "sdpa-efficient"
    assert "sdpa-cudnn (takes float16, bfloat16" in why
    assert choose("auto", on_card(dtype=torch.float64))[0].name == "sdpa"
    choice._remembered.cache_clear()
    for capability in (None, (7, 5), (8, 9), (9, 0), (12, 0)):
        assert all(BACKENDS[name].exact for name in auto_order(capability))


def test_a_number_of_keys_that_a_backend_gets_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "version", lambda package: "1.0.6")
    registry._sage_keys_multiple.cache_clear()
    BACKENDS["sage"].check_keys(1_344)
    with pytest.raises(T3Error, match="'sage'.*wrong for 2,142 keys.*multiple of 64.*have 2,112"):
        BACKENDS["sage"].check_keys(2_142)
    monkeypatch.setattr(registry, "version", lambda package: "2.2.0")
    registry._sage_keys_multiple.cache_clear()
    BACKENDS["sage"].check_keys(2_142)
    BACKENDS["sdpa"].check_keys(1)
    registry._sage_keys_multiple.cache_clear()


def test_a_missing_parent_package_is_just_not_installed():
    registry.installed.cache_clear()
    assert not registry.installed("no_such_package_at_all.submodule")


@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_usable_backend_computes_attention(device, name, dtype):
    """Error to float64 at most twice that of torch's plain kernel in the same dtype; 8-bit ones at most 5 %."""
    situation = Situation(torch.device(device), dtype, 128)
    backend = BACKENDS[name]
    if reason := backend.refusal(situation):
        pytest.skip(f"{name} is not usable here: {reason}")
    generator = torch.Generator().manual_seed(1)
    keys = 192 if backend.keys_multiple and backend.keys_multiple() > 1 else 133
    q, k, v = (torch.randn(3, n, 4, 128, generator=generator).to(device, dtype) for n in (70, keys, keys))
    before = k.clone()
    out = backend.attend(q, k, v, 128**-0.5)
    truth = dense_attention(q, k, v)
    plain = BACKENDS["sdpa-math"].attend(q, k, v, 128**-0.5)

    def error(x):
        return ((x.double() - truth).norm() / truth.norm()).item()

    assert out.shape == q.shape and out.dtype == dtype
    assert torch.equal(k, before)
    assert error(out) <= (2 * error(plain) if backend.exact else 0.05)
