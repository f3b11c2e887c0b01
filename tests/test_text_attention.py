"""Cross-attention by what attends windows in the headless engine, and what a block copies on the way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from copies import Copies, attend_like_cudnn
from test_processor import PLAN, inputs, run, transformer

from t3 import chunks, diffusers_text, fused, memory, text_attention
from t3.backends import BACKENDS, Backend, Situation
from t3.processor import install_t3
from t3.text_attention import attend_text, backend_for_text

CPU = Situation(torch.device("cpu"), torch.float64, 16, windows=(9,))


@pytest.mark.parametrize(("tokens", "keys"), [(1, 9), (33, 1), (1, 1), (37, 13)])
def test_attention_of_a_text(tokens, keys):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, n, 3 * 16, generator=generator, dtype=torch.float64).unflatten(2, (3, 16))
        for n in (tokens, keys, keys)
    )
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
    out = attend_text(*(x.flatten(2) for x in (q, k, v)), 3, BACKENDS["sdpa"])
    assert out.shape == expected.shape and (out - expected).norm() <= 1e-14 * expected.norm()


def test_which_backend_attends_a_text():
    exact = Backend("mine", "", BACKENDS["sdpa"].attend)
    assert backend_for_text(exact, CPU) == (exact, None)
    changes = {
        "mine computes in 8 bits": {"exact": False},
        "mine holds the scores of all tokens at once": {"scores": True},
        "takes float16, not torch.float64": {"dtypes": (torch.float16,)},
        "as installed, is wrong for 9 keys: it needs a multiple of 64, as 0 is": {"keys_multiple": lambda: 64},
    }
    for why, change in changes.items():
        assert backend_for_text(dataclasses.replace(exact, **change), CPU) == (BACKENDS["sdpa"], why)


# --- Modules and blocks of diffusers' --------------------------------------------------------------------------------

IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256}


@pytest.mark.parametrize("fused_projections", [False, True])
@pytest.mark.parametrize("image", [0, 257])
def test_equals_diffusers_own_in_float64(image, fused_projections):
    attn = transformer(num_layers=1, **(IMAGE if image else {})).blocks[0].attn2.double()
    if fused_projections:
        attn.fuse_projections()
    x, text = (torch.randn(2, n, 256, dtype=torch.float64) for n in (37, image + 512))
    said = []
    with torch.no_grad():
        ours = diffusers_text.TextAttention(attn, text, BACKENDS["sdpa"], said.append)
        for some in (x, x[:, 5:6], x[:, 7:20]):
            expected = attn(some.contiguous(), text, None, None)
            assert (ours(some) - expected).norm() <= 1e-13 * expected.norm()
    assert not said


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 tokens."""
    monkeypatch.setattr(chunks, "TILE", 16)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 32 * 256 * 4)


@pytest.fixture
def asked(monkeypatch):
    """What attended a text, by name, and with how many keys."""
    seen = []
    original = text_attention.attend_text

    def watching(q, k, v, heads, backend):
        seen.append((backend.name, k.shape[1]))
        return original(q, k, v, heads, backend)

    monkeypatch.setattr(text_attention, "attend_text", watching)
    return seen


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa-math"])
def test_blocks_use_it(small_chunks, monkeypatch, asked, backend, image):
    model = transformer(num_layers=2, **(IMAGE if image else {}))
    more = {"channels": 36, "encoder_hidden_states_image": torch.ones(2, 257, 1280)} if image else {}
    arguments, said = inputs((3, 5, 7), batch=2, **more), []
    install_t3(model, PLAN, backend=backend, say=said.append)
    out = run(model, arguments)
    assert set(asked) == {("sdpa", keys) for keys in ([257, 512] if image else [512])}
    about = [text for text in said if text.startswith("cross-attention")]
    reason = "cross-attention is computed by sdpa: sdpa-math holds the scores of all tokens at once."
    assert about == ([reason] if backend == "sdpa-math" else [])
    asked.clear()
    monkeypatch.setattr(memory, "CHUNK_BYTES", 2**40)
    plain = run(model, arguments)
    assert not asked and ((out - plain).norm() / plain.norm()).item() < 1e-5


def test_what_diffusers_was_told_to_use_is_left_alone(small_chunks, asked):
    model, arguments = transformer(num_layers=2), inputs()
    install_t3(model, PLAN, backend="sdpa")
    ours = run(model, arguments)
    assert asked
    asked.clear()
    model.set_attention_backend("native")
    assert ((run(model, arguments) - ours).norm() / ours.norm()).item() < 1e-5
    assert not asked


# The share of a tensor of all tokens that a block copies; why, where it is not nothing.
COPIED = {
    "one sample": (1, False, 0),
    # For the matrix product after attention: a chunk of two samples is no piece of memory.
    "batch of two": (2, False, 1),
    # The first block's input, for the norm before attention and the sum after it.
    "strided": (1, True, 2),
}


@pytest.mark.parametrize("case", COPIED)
def test_bytes_that_copies_move(small_chunks, monkeypatch, case):
    """By the kernels' operators, with an attention whose result lies as cuDNN's does."""
    batch, strided, tensors = COPIED[case]
    monkeypatch.setattr(fused, "triton_usable", lambda device, dtype: True)
    model, grid = transformer(num_layers=2), (4, 6, 8)
    install_t3(model, PLAN, backend=Backend("like cuDNN", "", attend_like_cudnn))
    counts = []
    for block in model.blocks:
        forward = block.forward

        def watching(x, *others, forward=forward):
            x = x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x.contiguous()
            with Copies(least=32 * x[0, 0].numel() * 4) as counted:
                out = forward(x, *others)
            counts.append((counted.moved / (x.numel() * 4), counted.found))
            return out

        block.forward = watching
    run(model, inputs(grid, batch=batch))
    assert [copied for copied, _ in counts] == [tensors] * 2, counts


@pytest.mark.parametrize("keys", [1, 13])
def test_the_operator_computes_and_says_what_it_gives(keys):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 48, generator=generator, dtype=torch.float64) for n in (37, keys, keys))
    out = text_attention._serve_text(q, k, v, 3, "sdpa")
    assert torch.equal(out, attend_text(q, k, v, 3, BACKENDS["sdpa"])) and out.is_contiguous()
    torch.library.opcheck(text_attention._serve_text, (q, k, v, 3, "sdpa"))


def test_the_operator_logs_once_what_there_is_to_say(caplog):
    x = torch.randn(1, 9, 32)
    text_attention._log_once.cache_clear()  # an earlier test may have said it
    for _ in range(2):
        text_attention._serve_text(x, x, x, 2, "sdpa-math")
    said = "cross-attention is computed by sdpa: sdpa-math holds the scores of all tokens at once."
    assert [record.getMessage() for record in caplog.records] == [f"T3: {said}"]
