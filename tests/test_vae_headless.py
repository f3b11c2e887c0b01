"""The headless engine's decode: diffusers' VAE in, frames out."""

import pytest
import torch
from small_models import _vae as narrow_vae
from vae_fixtures import NAMES, as_frames, random_latents
from vae_fixtures import one_thread as one_thread

from t3 import decoder
from t3.errors import T3Error

CPU = torch.device("cpu")


@pytest.mark.parametrize(("depth", "dtype", "most"), [(8, torch.uint8, 255), (10, torch.uint16, 65535)])
@pytest.mark.parametrize("name", NAMES)
def test_frames_are_the_librarys_but_for_rounding(name, capsys, depth, dtype, most):
    vae = narrow_vae(name)
    latents = random_latents(name, 3, 3, 5, dtype=torch.float32)
    with torch.no_grad():
        wanted = as_frames(vae.decode(latents).sample)[0]
    pieces = list(decoder.decode_frames(vae, latents, CPU, pytest.fail, depth))
    assert {(piece.shape[0], piece.dtype) for piece in pieces} == {(1, dtype)}
    found = torch.cat([piece.to(torch.float32) for piece in pieces]) / most
    assert len(found) == decoder.frame_count(3) == 9
    assert (found - wanted).abs().max() < 0.5 / most + 1e-5
    assert "decoding tiles" in capsys.readouterr().err


def test_latents_of_the_other_generation_are_refused():
    latents = random_latents("wan2.2-vae", 1, 2, 2)
    with pytest.raises(T3Error, match="48 channels and this VAE decodes 16"):
        next(decoder.decode_frames(narrow_vae("wan2.1-vae"), latents, CPU, print, 8))
