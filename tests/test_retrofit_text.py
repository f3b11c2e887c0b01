"""Short texts in training: a few tokens that count for all padding give what all of it gives."""

import math

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from t3.retrofit.data import pad_text
from t3.retrofit.text import PADS, logits, rows_for, shorten

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


@pytest.mark.parametrize(("longest", "tokens", "rows"), [(19, 512, 24), (21, 512, 32), (1, 6, 6), (508, 512, 512)])
def test_rows(longest, tokens, rows):
    assert rows_for(longest, tokens) == rows
    assert rows == tokens or rows >= longest + PADS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "tokens"), [(24, 512), (8, 512), (24, 25), (496, 512), (24, 100_000)])
def test_logits_count_all_padding(dtype, rows, tokens):
    raised = logits(rows, tokens, dtype)
    assert raised.dtype == dtype and raised.shape == (rows,) and not raised[: rows - PADS].any()
    assert math.isclose(raised.double().exp().sum().item(), tokens, rel_tol=1e-6)


@pytest.mark.parametrize("kind", [WanTransformer3DModel, WanVACETransformer3DModel])
def test_what_a_model_makes_and_its_gradients_are_those_of_the_padded_text(kind):
    torch.manual_seed(0)
    more = {"vace_layers": [0], "vace_in_channels": 4} if kind is WanVACETransformer3DModel else {}
    model = kind(**TINY, **more).double()
    texts = [torch.randn(length, 8, dtype=torch.float64) for length in (3, 5)]
    inputs = {"hidden_states": torch.randn(2, 4, 1, 4, 6).double(), "timestep": torch.tensor([1, 900])}
    if more:
        inputs["control_hidden_states"] = torch.randn(2, 4, 1, 4, 6).double()

    def run(rows):
        model.zero_grad()
        padded = torch.stack([pad_text(text, rows) for text in texts]).requires_grad_()
        out = model(encoder_hidden_states=padded, return_dict=False, **inputs)[0]
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return out.detach(), {**gradients, "first tokens": padded.grad[:, :3].clone()}

    tokens, rows = 77, rows_for(5, 77)
    wanted, gradients = run(tokens)
    unlike = run(rows)[0]
    shorten(model, logits(rows, tokens, torch.float64))
    same, _ = run(tokens)
    found, again = run(rows)
    torch.testing.assert_close(same, wanted)  # a text of full length is taken as it is
    torch.testing.assert_close(found, wanted, rtol=0, atol=_float32(wanted))
    assert (unlike - wanted).abs().max() > 1e-4  # leaving padding out is something else
    assert again.keys() == gradients.keys()
    for name in gradients:
        wanted = gradients[name]
        torch.testing.assert_close(again[name], wanted, rtol=0, atol=_float32(wanted), msg=name)


def _float32(wanted):
    """diffusers' blocks norm in float32, whatever their weights are: sixteen roundings of the largest number."""
    return 16 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
