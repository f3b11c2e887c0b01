"""What T3 tools write into headers: round trips, damage, and the fingerprint of a base."""

import json
import math

import pytest
import torch
from weights_fixtures import TINY, one_thread, original_state, save, tiny_transformer  # noqa: F401

from t3.errors import T3Error
from t3.plan import Grid, Plan
from t3.weights import T3Metadata, apply_weights, identify, open_weights, read_metadata
from t3.weights.fingerprint import Fingerprint, fingerprint
from t3.weights.merge import MergedFile

PLAN = Plan("mine", Grid(2, 4, 6), (("each", 1, 1), (1, 2, 3)))


def print_of(state, model="custom"):
    return fingerprint(model, state, state.__getitem__)


def base_text(samples):
    return json.dumps({"model": "x", "width": 1, "layers": 1, "samples": samples})


def diff_file(folder, metadata):
    return save(folder / "a.safetensors", {"blocks.0.norm3.diff": torch.ones(128)}, metadata)


def test_round_trip(tmp_path):
    base = print_of(original_state(tiny_transformer()))
    written = T3Metadata(PLAN, Grid(2, 4, 6), base, 64, "a tool 1.0")
    header = written.to_header()
    assert set(header) == {f"t3.{name}" for name in ("version", "plan", "grid", "base", "rank", "writer")}
    found = identify(open_weights(diff_file(tmp_path, header | {"format": "pt", "t3.more": "?"})))
    assert found.t3 == T3Metadata(PLAN, Grid(2, 4, 6), base, 64, "a tool 1.0", ("t3.more",))
    assert found.plan == PLAN.to_json() and found.tuned == "yes"
    lines = "; ".join(found.t3.describe())
    assert all(
        words in lines for words in ("'mine'", "2 x 4 x 6", "custom, 128 wide, 2 blocks", "rank up to 64", "t3.more")
    )


def test_nothing_written_says_nothing():
    assert T3Metadata().to_header() == {} and read_metadata({"format": "pt"}, "x") == T3Metadata()
    assert T3Metadata().tuned == "cannot tell" and T3Metadata().trained_grid is None
    assert T3Metadata(PLAN).trained_grid == Grid(2, 4, 6)
    assert T3Metadata(PLAN, Grid(3, 4, 6)).trained_grid == Grid(3, 4, 6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("t3.plan", "{", "not JSON"),
        ("t3.plan", '{"t3_plan": 1, "grid": [2, 4, 6], "layers": [[3, 1, 1]]}', "3 windows along t"),
        ("t3.plan", '{"t3_plan": 9}', "version 9"),
        ("t3.version", "2", "version 2, and this release reads up to 1"),
        ("t3.version", "0", "version 0, and this release reads up to 1"),
        ("t3.version", "new", "'new'"),
        ("t3.grid", "[2, 4]", r"\[2, 4\]"),
        ("t3.rank", "-1", "'-1'"),
        ("t3.base", "{}", "fingerprint"),
        ("t3.base", base_text([[1.0], [2.0]]), "fingerprint"),
        ("t3.base", base_text([[math.nan] * 4] * 2), "fingerprint"),
    ],
)
def test_damage_is_named_and_stops_every_reader(tmp_path, key, value, message):
    path = diff_file(tmp_path, {key: value})
    found = identify(open_weights(path))
    assert (found.form, found.tuned, found.plan) == ("diff", "cannot tell", None)
    for read in (
        lambda: read_metadata(open_weights(path).metadata, path),
        lambda: apply_weights(tiny_transformer(), open_weights(path)),
    ):
        with pytest.raises(T3Error, match=message) as caught:
            read()
        assert str(caught.value) == found.problem and key in found.problem and str(path) in found.problem


def test_fingerprint_knows_its_base_in_any_format():
    state = original_state(tiny_transformer())
    own = print_of(state)
    assert own.distance(own) == 0 and Fingerprint.from_json(own.to_json()) == own
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert own.fits(print_of({name: t.to(dtype) for name, t in state.items()})), dtype
    tuned = {name: t + 0.05 * t.std() * torch.randn(t.shape) if t.numel() > 1 else t for name, t in state.items()}
    assert own.distance(print_of(tuned)) > 0 and own.fits(print_of(tuned))
    apart = {name: t + 0.3 * t.std() * torch.randn(t.shape) if t.numel() > 1 else t for name, t in state.items()}
    assert not own.fits(print_of(apart))
    trained = original_state(tiny_transformer(seed=1))
    for part in ("modulation", "self_attn.q.bias"):
        mixed = {name: trained[name] if name.endswith(part) else tensor for name, tensor in state.items()}
        assert not own.fits(print_of(mixed)), part
    other = print_of(trained)
    assert own.distance(other) > 0.8 and not own.fits(other)
    deeper = {**TINY, "num_layers": 3}
    assert own.distance(print_of(original_state(tiny_transformer(deeper), deeper))) == math.inf
    assert print_of({"head.modulation": torch.ones(1, 2, 128)}) is None


def test_a_whole_checkpoint_needs_no_base(tmp_path):
    """It replaces every number; what it was trained from does not matter."""
    other = original_state(tiny_transformer(seed=1))
    path = save(tmp_path / "a.safetensors", other, T3Metadata(base=print_of(other)).to_header())
    assert "another base" not in apply_weights(tiny_transformer(), open_weights(path)).describe()


def test_in_a_merge_each_file_meets_what_those_before_it_left(tmp_path):
    first, second = (original_state(tiny_transformer(seed=seed)) for seed in (0, 1))
    base = open_weights(save(tmp_path / "base.safetensors", first))
    marked = {}
    for name, state in (("first", first), ("second", second)):
        header = T3Metadata(base=print_of(state)).to_header()
        # To the second model, and from there nowhere.
        tensors = {f"{key}.set_weight" if key.endswith("modulation") else key: second[key] for key in first}
        tensors = {
            key.removesuffix(".bias") + ".diff_b" if key.endswith("self_attn.q.bias") else key: value
            for key, value in tensors.items()
            if key.endswith(("modulation.set_weight", "self_attn.q.bias"))
        }
        for key in list(tensors):
            if key.endswith("diff_b"):
                place = key.removesuffix("diff_b") + "bias"
                tensors[key] = second[place] - first[place] if name == "first" else torch.zeros_like(second[place])
        marked[name] = open_weights(save(tmp_path / f"{name}.safetensors", tensors, header))
    for order, told in ((("first", "second"), [False, False]), (("first", "first"), [False, True])):
        merged = MergedFile(base, identify(base), [(marked[name], 1.0) for name in order])
        notes = [any("made for another base" in note for note in step.report.notes) for step in merged.steps]
        assert notes == told


@pytest.mark.parametrize("same", [True, False])
def test_weights_for_another_base_are_told(tmp_path, same):
    base = print_of(original_state(tiny_transformer(seed=0 if same else 1)))
    report = apply_weights(tiny_transformer(), open_weights(diff_file(tmp_path, T3Metadata(base=base).to_header())))
    assert ("made for another base" in report.describe()) == (not same)
