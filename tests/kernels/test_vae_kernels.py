"""The decoder and encoder through their Triton kernels, against the same through plain torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # for the fixtures, where pytest is given this folder alone

from vae_fixtures import NAMES, SCALE, config, off, random_latents, random_state

from t3.vae import WanDecoder, WanEncoder, decode_frames, encode_frames, sums


@pytest.fixture
def kernels(device, monkeypatch):
    """Kernels used wherever the tensors are, or nowhere: `kernels(False)`."""

    def use(wanted: bool) -> None:
        monkeypatch.setattr(sums, "triton_usable", lambda where, dtype: wanted)

    with torch.backends.cudnn.flags(allow_tf32=False):
        yield use


def count_kernels(monkeypatch) -> list:
    from t3.kernels.conv_sum import kernel

    plain, calls = kernel.conv_sum, []
    monkeypatch.setattr(kernel, "conv_sum", lambda *args, **options: calls.append(1) or plain(*args, **options))
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_decode(device, kernels, monkeypatch, name):
    calls = count_kernels(monkeypatch)
    decoder = WanDecoder.from_state_dict(random_state(name), device, torch.float32)
    latents = random_latents(name, 2, 3, 4, dtype=torch.float32)
    exact = decode_frames(WanDecoder.from_state_dict(random_state(name)), latents.double())
    found = {}
    for use in (True, False):
        kernels(use)
        found[use] = decode_frames(decoder, latents, tile=2 * SCALE[name])
        assert bool(calls) == use
        calls.clear()
    assert off(found[True], exact) <= 2 * off(found[False], exact) + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_encode(device, kernels, monkeypatch, name):
    calls = count_kernels(monkeypatch)
    encoder = WanEncoder.from_state_dict(random_state(name), device, torch.float32)
    generator = torch.Generator().manual_seed(3)
    frames = torch.rand(1, 5, 2 * SCALE[name], 3 * SCALE[name], 3, generator=generator)
    exact = encode_frames(WanEncoder.from_state_dict(random_state(name)), frames.double())
    found = {}
    for use in (True, False):
        kernels(use)
        found[use] = encode_frames(encoder, frames, tile=2 * SCALE[name])
        assert bool(calls) == use
        calls.clear()
    assert off(found[True], exact) <= 2 * off(found[False], exact) + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_on_a_gpu(device, name):
    """bfloat16 in tiles, with all kernels, no further from float64 than 1.2 times plain torch's untiled bfloat16."""
    if device == "cpu":
        pytest.skip("needs a GPU")
    # Wide enough for the kernel of the middle attention.
    state = random_state(
        name, dtype=torch.bfloat16, **{"base_dim": 96} if name == "wan2.1-vae" else {"decoder_base_dim": 96}
    )
    latents = random_latents(name, 3, 8, 12, dtype=torch.bfloat16)
    exact = decode_frames(WanDecoder.from_state_dict(state, device, torch.float64), latents)
    decoder = WanDecoder.from_state_dict(state, device)
    ours = decode_frames(decoder, latents, tile=4 * SCALE[name], out=torch.empty(exact.shape, dtype=torch.float32))
    AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan
    from t3.weights.layout_vae import vae_layout

    changes = {"base_dim": 96} if name == "wan2.1-vae" else {"decoder_base_dim": 96}
    model = AutoencoderKLWan(**config(name, **changes))
    layout = vae_layout(config(name, **changes))
    model.load_state_dict({param.name: state[key] for key, param in layout.items()}, strict=True)
    with torch.no_grad():
        theirs = model.to(device, torch.bfloat16).decode(latents.to(device)).sample
    theirs = ((theirs.double() + 1) / 2).clamp(0, 1).movedim(1, -1).cpu()
    assert (ours - exact).square().mean() <= 1.2**2 * (theirs - exact).square().mean()
