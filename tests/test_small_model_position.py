"""A transformer whose tokens are told where they are."""

import pytest
import torch
from retrofit_fixtures import write_clips

from t3.retrofit.shards import open_shards
from t3.weights import load_transformer
from tools.small_model import position
from tools.small_model.init_dit import make_transformer

GRID = (6, 14, 20)


def transformer():
    return make_transformer(num_layers=1).eval()


def clips(count=8):
    """Latents of pictures that are smooth, and texts."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, 16, 2, 4, 5, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, (6, 28, 40), mode="trilinear")
    return latents, torch.randn(count, 4, transformer().config.text_dim, generator=generator)


@pytest.fixture(scope="module")
def placed():
    model = transformer()
    before = position.readable(model, GRID, 16)
    position.place(model, *clips())
    return model, before


def test_over_pure_noise_positions_are_read_from_the_first_block(placed):
    model, before = placed
    after = position.readable(model, GRID, 16)
    assert set(after) == {"frame", "row", "column"} and max(before.values()) < 0.3
    assert min(after.values()) > 0.85
    still = position.readable(model, (1, *GRID[1:]), 32)
    assert set(still) == {"row", "column"} and min(still.values()) > 0.6


def test_the_other_head_is_left_as_it_was(placed):
    """Its weights are; its queries and keys are to 3 and 13 %, through the norm that both heads share."""
    plain, (model, _) = transformer(), placed
    one, two = plain.blocks[0].attn1, model.blocks[0].attn1
    for name in ("to_q", "to_k", "to_v"):
        assert torch.equal(getattr(one, name).weight[:128], getattr(two, name).weight[:128])
    assert torch.equal(one.to_out[0].weight[:, :128], two.to_out[0].weight[:, :128])
    inputs, _ = position.attention_inputs(plain, *clips(), sigma=1.0, seed=5)
    for name in ("q", "k"):
        first, second = (
            getattr(each, f"norm_{name}")(getattr(each, f"to_{name}")(inputs))[..., :128] for each in (one, two)
        )
        assert (first - second).norm() < 0.25 * first.norm()


def test_directions_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="vary in 3 directions, and 6 are asked for"):
        position.noise_directions([torch.randn(2, 8, 3)], (2, 2, 2), 6)


def test_clips_are_read_as_they_were_encoded(tmp_path):
    write_clips(tmp_path / "set", 5)
    latents, text = position.read_clips(tmp_path / "set", 3)
    assert latents.shape == (3, 16, 2, 6, 8) and text.shape[::2] == (3, 8)
    first = open_shards(tmp_path / "set").load(0)
    assert torch.equal(latents[0], first.latents.float()) and not text[0, len(first.text) :].any()


def test_the_command_writes_weights_and_replaces_none(tmp_path, placed, monkeypatch, capsys):
    from t3.plan import Grid
    from t3.retrofit.output import write_full

    model, dit = transformer(), tmp_path / "dense.safetensors"
    write_full(dit, model.state_dict(), dict(model.config), None, Grid(*GRID), "float32")
    monkeypatch.setattr(position, "read_clips", lambda folder, count: clips())
    out = tmp_path / "new" / "placed.safetensors"
    arguments = ["--dit", str(dit), "--data", str(tmp_path), "--out", str(out)]
    position.main(arguments)
    assert "before" in capsys.readouterr().out
    written = load_transformer(out, dtype=torch.float32).state_dict()
    for name, tensor in placed[0].state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(SystemExit, match="exists already"):
        position.main(arguments)
