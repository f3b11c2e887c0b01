"""What a rank computes of its own tokens alone is what all tokens' would be, to the bit, and no more of it."""

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from t3.parallel.sequence import Spread
from t3.parallel.spreading import Spreading

SMALL = {"num_attention_heads": 2, "attention_head_dim": 20, "ffn_dim": 16, "num_layers": 1, "text_dim": 8}
GRID = (3, 5, 7)


def model(**more):
    torch.manual_seed(1)
    kind = WanVACETransformer3DModel if "vace_layers" in more else WanTransformer3DModel
    return kind(**SMALL, freq_dim=8, **more).eval()


@pytest.mark.parametrize("size", [2, 3, 5, 60])
@torch.no_grad()
def test_embedding_and_turns_of_a_ranks_tokens(size):
    transformer = model()
    latents = torch.randn(2, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])
    embedded = transformer.patch_embedding(latents).flatten(2)
    turned = transformer.rope(latents)
    ends, frame = 0, GRID[1] * GRID[2]
    for rank in range(size):
        spreading = Spreading(transformer, Spread(None, rank, size))
        args, kwargs = spreading._begin(transformer, (latents, torch.ones(2)), {"encoder_hidden_states": None})
        assert args[0] is latents and list(kwargs) == ["encoder_hidden_states"]
        own = spreading.own
        assert own.start == ends
        ends = own.stop
        seen = []
        probe = transformer.patch_embedding.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args))
        assert torch.equal(transformer.patch_embedding(latents), embedded[:, :, own])
        assert seen[0].shape[2] == (own.stop - 1) // frame + 1 - own.start // frame
        probe.remove()
        for found, whole in zip(transformer.rope(latents), turned, strict=True):
            assert found.dtype == whole.dtype and torch.equal(found, whole[:, own])
        spreading.remove()
    assert ends == embedded.shape[2]
    assert torch.equal(transformer.rope(latents)[0], turned[0]), "removed without a trace"
    assert "forward" not in vars(transformer.rope)


@pytest.mark.parametrize("named", [True, False])
def test_a_time_for_each_token_is_shared_out_too(named):
    transformer, latents = model(), torch.randn(1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])
    times = torch.rand(1, 105)
    spreading = Spreading(transformer, Spread(None, 1, 2))
    given = {"hidden_states": latents, "timestep": times, "encoder_hidden_states": times}
    if named:
        args, kwargs = spreading._begin(transformer, (), given)
        found = kwargs["timestep"]
        assert kwargs["encoder_hidden_states"] is times
    else:
        args, kwargs = spreading._begin(transformer, tuple(given.values()), {})
        found = args[1]
        assert args[2] is times and not kwargs
    assert torch.equal(found, times[:, 53:])


@torch.no_grad()
def test_control_may_end_before_the_video():
    transformer = model(vace_layers=[0], vace_in_channels=6)
    latents = torch.randn(1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])
    control = torch.randn(1, 6, 2, 2 * GRID[1], 2 * GRID[2])
    whole = transformer.vace_patch_embedding(control).flatten(2)
    for rank in range(4):
        spreading = Spreading(transformer, Spread(None, rank, 4))
        spreading._begin(transformer, (latents, torch.ones(1)), {})
        assert torch.equal(transformer.vace_patch_embedding(control), whole[:, :, spreading.own])
        spreading.remove()
