"""What encode and decode resort to: another layout of pictures, main memory, and a word on frames that are suspect."""

import pytest
import torch
from vae_fixtures import NAMES, SCALE, as_frames, off, out_of_memory, random_latents, random_state
from vae_fixtures import one_thread as one_thread

from t3.errors import T3Error
from t3.vae import WanDecoder, WanEncoder, decode_frames, encode, encode_frames


def frames_of(name, count, rows, cols, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    size = rows * SCALE[name], cols * SCALE[name]
    return torch.rand(batch, count, *size, 3, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_apples_gpus_gives_the_same_numbers(monkeypatch, name):
    """Plain contiguous tensors, forced on the CPU: batches, tiles that do not divide, a clip longer than any cache."""
    state = random_state(name)
    frames, latents = frames_of(name, 9, 3, 2, batch=2), random_latents(name, 3, 3, 2, batch=2)
    video = (frames * 2 - 1).movedim(-1, 1)

    def results():
        encoder, decoder = WanEncoder.from_state_dict(state), WanDecoder.from_state_dict(state)
        order = {module.weight.is_contiguous() for module in encoder.modules() if _is_wide(module)}
        tile = 2 * SCALE[name]
        tiled = encode_frames(encoder, frames, tile=tile), decode_frames(decoder, latents, tile=tile)
        return order, [*tiled, encoder.untiled(video), as_frames(decoder.untiled(latents))]

    order, wanted = results()
    assert order == {False}
    for module in ("sums", "layers", "past", "encode", "decoder"):
        monkeypatch.setattr(f"t3.vae.{module}.layout", lambda device: torch.contiguous_format)
    order, found = results()
    assert order == {True}
    for have, want in zip(found, wanted, strict=True):
        assert off(have, want) < 1e-13


def _is_wide(module):
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[-1] > 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failures", [1, 2])
def test_no_room_for_the_middle_stages_input(monkeypatch, name, failures):
    """It waits in main memory instead; where that is full too, nothing is left half done."""
    encoder, frames = WanEncoder.from_state_dict(random_state(name)), frames_of(name, 5, 2, 3)
    wanted, plain, made, told = encode_frames(encoder, frames), torch.empty, [], []

    class Torch:
        """torch as `encode` sees it: memory runs out at the second latent frame, so many times."""

        def __getattr__(self, attribute):
            return getattr(torch, attribute)

        def empty(self, *shape, **options):
            if "memory_format" in options:
                made.append(options["device"])
                if len(made) in (2, 4)[:failures]:
                    raise out_of_memory()
            return plain(*shape, **options)

    monkeypatch.setattr(encode, "torch", Torch())
    if failures == 1:
        assert off(encode_frames(encoder, frames, say=told.append), wanted) < 1e-13
    else:
        with pytest.raises(T3Error, match="main memory: there is not even memory to keep the middle stage's input"):
            encode_frames(encoder, frames, say=told.append)
    assert told == ["encode: no memory for the middle stage's input; going on with it in main memory."]
    assert len(made) == 4 and made[2:] == [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-0.2, 1.0, True),  # a clip in [-1, 1], nowhere dark
        (-0.2, 0.1, True),
        (0.0, 1.0, False),
        (-0.01, 1.0, False),  # rounding
    ],
)
def test_frames_that_look_like_another_range_are_told(low, high, told):
    encoder = WanEncoder.from_state_dict(random_state("wan2.1-vae"), dtype=torch.float32)
    heard = []
    frames = low + (high - low) * frames_of("wan2.1-vae", 1, 2, 2, dtype=torch.float32)
    encode_frames(encoder, frames, say=heard.append)
    assert bool(heard) == told
    if told:
        assert "below black, down to -0.2" in heard[0] and "give (frames + 1) / 2" in heard[0]


def test_what_a_sharp_filter_does_is_no_reason_to_warn():
    """A white disc on black, enlarged bicubically: it rings below black, in few pixels."""
    at = torch.linspace(-1, 1, 64)
    disc = (at[:, None] ** 2 + at**2 < 0.4).float().expand(1, 3, 64, 64)
    large = torch.nn.functional.interpolate(disc, size=(128, 128), mode="bicubic")
    assert large.min() < -0.05
    heard = []
    encoder = WanEncoder.from_state_dict(random_state("wan2.1-vae"), dtype=torch.float32)
    encode_frames(encoder, large.movedim(1, -1)[:, None], say=heard.append)
    assert not heard
