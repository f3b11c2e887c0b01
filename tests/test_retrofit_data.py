"""Data sets: shards and their faults, the order of clips, what is random, batches read ahead."""

import json
from collections import Counter

import pytest
import torch
from retrofit_fixtures import SHAPE, TINY, write_clips

from t3.errors import T3Error
from t3.retrofit.batches import Feeder
from t3.retrofit.config import Data, DataSet, Stage, Validation
from t3.retrofit.data import Layout, Order, Pool, open_clips
from t3.retrofit.draws import noise, noise_level, sample_draws
from t3.retrofit.shards import ShardWriter, join, open_shards, read_shards
from t3.retrofit.validation import points

FACTS = {"caption": "a dot", "frames": 5, "height": 48, "width": 64, "fps": 16}


def data(*folders, **changes):
    return Data(sets=tuple(DataSet(folder.name, str(folder)) for folder in folders), **changes)


def test_shards_give_back_what_was_added(tmp_path):
    torch.manual_seed(0)
    wanted = []
    with ShardWriter(tmp_path / "set", shard_bytes=1000) as writer:
        for i in range(5):
            latents = torch.randn(4, 2, 4, 6 + 2 * (i % 2)).half().transpose(2, 3)
            text = torch.randn(3 + i, 8)
            writer.add(latents, text, source=f"{i}.mp4", **FACTS)
            wanted.append((latents, text.bfloat16(), f"{i}.mp4"))
        writer.empty_text(torch.ones(1, 8))
    shards = open_shards(tmp_path / "set")
    assert len(shards.index["shards"]) > 1
    for clip, (latents, text, source) in zip(read_shards(tmp_path / "set"), wanted, strict=True):
        assert torch.equal(clip.latents, latents)
        assert torch.equal(clip.text, text)
        assert (clip.facts.source, clip.facts.caption, clip.facts.fps) == (source, "a dot", 16.0)
    assert torch.equal(shards.empty_text(), torch.ones(1, 8, dtype=torch.bfloat16))
    assert next(read_shards(tmp_path / "set", [3])).facts.source == "3.mp4"


def test_a_shard_that_no_index_lists_does_not_count(tmp_path):
    """A run killed between the shard and the index does that clip again."""
    write_clips(tmp_path / "set", 2)
    (tmp_path / "set" / "clips-00001.safetensors").write_bytes(b"half")
    with ShardWriter(tmp_path / "set") as writer:
        assert writer.done == {"0-0.mp4", "0-1.mp4"}
        writer.add(torch.zeros(SHAPE), torch.zeros(3, 8), source="new", **FACTS)
    assert [clip.facts.source for clip in read_shards(tmp_path / "set")] == ["0-0.mp4", "0-1.mp4", "new"]


def test_faults_of_shards_are_told(tmp_path):
    with pytest.raises(T3Error, match="no encoded data set"):
        open_shards(tmp_path)
    with pytest.raises(T3Error, match="t3.retrofit encode"):
        open_shards(tmp_path / "missing")
    writer = ShardWriter(tmp_path / "set", facts={"fps": 16})
    with pytest.raises(T3Error, match="x.mp4: 2 of 24 values of its latents are not finite"):
        latents = torch.ones(1, 2, 3, 4)
        latents[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
        writer.add(latents, torch.zeros(1, 2), source="x.mp4", **FACTS)
    with pytest.raises(T3Error, match="expected \\[C, T, H, W\\]"):
        writer.add(torch.ones(2, 3, 4), torch.zeros(1, 2), source="x.mp4", **FACTS)
    writer.add(torch.ones(1, 2, 3, 4), torch.zeros(1, 2), source="x.mp4", **FACTS)
    writer.close()
    with pytest.raises(T3Error, match="was encoded otherwise"):
        ShardWriter(tmp_path / "set", facts={"fps": 24})
    (tmp_path / "set" / "clips-00000.safetensors").unlink()
    with pytest.raises(T3Error, match="lacks 1 of its shards, such as clips-00000"):
        open_shards(tmp_path / "set")
    (tmp_path / "set" / "index.json").write_text(json.dumps({"t3_dataset": 9}))
    with pytest.raises(T3Error, match="version 9"):
        open_shards(tmp_path / "set")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out_channels": 48}, "latents of 16 channels and this model makes 48"),
        ({"text_dim": 16}, "text embeddings 8 wide and this model takes 16"),
        ({"patch_size": (1, 4, 4)}, "do not divide"),
    ],
)
def test_data_of_another_model_are_refused(tmp_path, changes, said):
    write_clips(tmp_path / "set")
    with pytest.raises(T3Error, match=said):
        open_clips(data(tmp_path / "set"), {**TINY, **changes}, 6)


def test_what_a_config_asks_of_its_data(tmp_path):
    write_clips(tmp_path / "set")
    write_clips(tmp_path / "bare", empty=False)
    write_clips(tmp_path / "none", 0)
    with pytest.raises(T3Error, match="4 tokens, more than \\[model\\] text_tokens = 3. Set it to 4"):
        open_clips(data(tmp_path / "set"), TINY, 3)
    with pytest.raises(T3Error, match="caption_dropout is 0.1, but no data set holds the empty caption"):
        open_clips(data(tmp_path / "bare"), TINY, 6)
    with pytest.raises(T3Error, match="holds no clip"):
        open_clips(data(tmp_path / "none"), TINY, 6)
    with pytest.raises(T3Error, match="holdout is 6, and .* has 6 clips. Nearest: 5"):
        open_clips(data(tmp_path / "set", holdout=6), TINY, 6)
    clips = open_clips(data(tmp_path / "set", tmp_path / "bare", holdout=2), TINY, 6)
    assert (clips.count, len(clips.held_out)) == (8, 4)
    kept = {reference.stored.facts.source for pool in clips.pools for reference in pool.clips}
    assert kept == {f"0-{i}.mp4" for i in range(4)}


def test_every_clip_comes_once_before_any_comes_twice():
    order = Order(
        [Pool("a", SHAPE, list(range(7)), 6), Pool("b", SHAPE, list(range(3)), 6)], seed=4, layout=Layout(2, 1, 0)
    )
    taken = {"a": [], "b": []}
    for _ in range(60):
        pool, numbers = order.next({})
        taken[pool.name] += numbers
    for name, count in (("a", 7), ("b", 3)):
        numbers = taken[name]
        rounds = [numbers[start : start + count] for start in range(0, len(numbers) - count + 1, count)]
        assert all(sorted(some) == list(range(count)) for some in rounds)
        assert len({tuple(some) for some in rounds}) > 1
    assert len(taken["a"]) > len(taken["b"]) > 0


def test_the_mix_of_sets_is_kept():
    pools = [
        Pool("a", SHAPE, [0], 6),
        Pool("a", (16, 2, 6, 12), [0], 6),
        Pool("b", SHAPE, list(range(50)), 6),
        Pool("c", SHAPE, [0], 6),
    ]
    order = Order(pools, seed=0, layout=Layout(1, 1, 0))
    count = Counter(order.next({"a": 3.0, "b": 1.0})[0].name for _ in range(2000))
    # Three in four: within four standard deviations of 2,000 draws.
    assert abs(count["a"] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert not count["c"]


def test_a_set_may_have_a_batch_of_its_own():
    """Then each of its clips still comes as often as any other, or its set gives its share of the batches."""
    pools = [Pool("a", SHAPE, list(range(90)), 6), Pool("b", SHAPE, list(range(90)), 6, batch=3)]
    order = Order(pools, seed=0, layout=Layout(1, 2, 0))
    taken = [order.next({}) for _ in range(4000)]
    assert {(pool.name, len(numbers)) for pool, numbers in taken} == {("a", 2), ("b", 6)}
    # One batch in four: within four standard deviations.
    b = sum(pool.name == "b" for pool, _ in taken)
    assert abs(b / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    b = sum(order.next({"a": 1.0, "b": 1.0})[0].name == "b" for _ in range(4000))
    assert abs(b / 4000 - 0.5) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("own", [0, 6])
def test_batches_are_the_same_read_ahead_split_or_resumed(tmp_path, own):
    """own: clips of the set "b" at once, where that is another number."""
    write_clips(tmp_path / "a", 5)
    write_clips(tmp_path / "b", 4, shape=(16, 2, 6, 12), seed=1)
    stages = [Stage(name="one", attention=1.0, queries=3), Stage(name="two", shift=1.0, mix={"b": 1.0})]

    def feeder(layout, resident):
        clips = open_clips(data(tmp_path / "a", tmp_path / "b"), TINY, 6)
        for pool in clips.pools:
            pool.batch = own // layout.processes if pool.name == "b" else 0
        return Feeder(
            clips, layout, seed=7, caption_dropout=0.5, patch=(1, 2, 2), device=torch.device("cpu"), resident=resident
        )

    whole = feeder(Layout(4, 1, 0), True)
    wanted = [whole.next(stages[i >= 3]) for i in range(6)]
    ahead = feeder(Layout(4, 1, 0), False)
    halves = [feeder(Layout(2, 2, rank), rank == 0) for rank in (0, 1)]
    for i, batch in enumerate(wanted):
        state = ahead.state()
        parts = [half.next(stages[i >= 3]) for half in halves]
        split = [torch.cat(pair) for pair in zip(*(part[:4] for part in parts), strict=True)]
        again = feeder(Layout(4, 1, 0), i % 2 == 0)
        again.restore(json.loads(json.dumps(state)))
        for other in (ahead.next(stages[i >= 3]), again.next(stages[i >= 3]), [*split, parts[0].rows]):
            for a, b in zip(batch[:5], other[:5], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
        again.close()
    assert wanted[0].rows.shape == (3,)
    assert wanted[4].rows is None
    assert {batch.latents.shape[-1] for batch in wanted[3:]} == {12}
    assert {len(batch.latents) for batch in wanted[3:]} == {own or 4}
    dropped = torch.cat([(batch.text == 0).flatten(1).all(1) for batch in wanted])
    assert 0 < dropped.sum() < len(dropped)
    ahead.close()


def test_draws_depend_on_the_seed_and_the_clip_alone():
    assert sample_draws(1, 2) == sample_draws(1, 2)
    assert len({sample_draws(seed, serial).noise for seed in range(3) for serial in range(3)}) == 9
    one, other = noise([5, 6], (2, 3), torch.device("cpu")), noise([6], (2, 3), torch.device("cpu"))
    assert torch.equal(one[1:], other)
    levels = torch.tensor([noise_level(sample_draws(0, i), "uniform", 5.0, 0.2, 0.9) for i in range(2000)])
    assert levels.min() >= 0.2 and levels.max() <= 0.9
    # The mean of 5u / (1 + 4u) over the u that give levels of 0.2 to 0.9; four deviations of 2,000 draws at most apart.
    ends = torch.tensor([0.2 / 4.2, 0.9 / 1.4])
    whole = 1.25 * ends - 0.3125 * (1 + 4 * ends).log()
    expected = float((whole[1] - whole[0]) / (ends[1] - ends[0]))
    assert abs(levels.mean() - expected) < 4 * levels.std() / 2000**0.5


@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6)])
def test_noise_levels_of_a_part_are_those_of_the_whole_that_lie_in_it(low, high):
    draws = [sample_draws(0, i) for i in range(6000)]
    whole = torch.tensor([noise_level(d, "logit-normal", 5.0, 0.0, 1.0) for d in draws])
    kept = whole[(whole >= low) & (whole <= high)]
    found = torch.tensor([noise_level(d, "logit-normal", 5.0, low, high) for d in draws[:1500]])
    assert found.min() >= low and found.max() <= high
    assert abs(found.mean() - kept.mean()) < 4 * kept.std() * (1 / 1500 + 1 / len(kept)) ** 0.5


def test_validation_points_are_stratified_and_paired():
    found = points(32, Validation(levels=16, draws=2, seed=3))
    assert found == points(40, Validation(levels=16, draws=2, seed=3))[:64]
    few = {int(point.sigma * 3) for point in points(4, Validation(levels=16))}
    assert few == {0, 1, 2}
    strata = Counter(int(point.sigma * 16) for point in found)
    assert strata == dict.fromkeys(range(16), 4)
    assert len({point.noise for point in found}) == 64


def test_data_sets_that_were_encoded_alike_become_one(tmp_path):
    parts = [write_clips(tmp_path / f"part-{seed}", 3, seed=seed) for seed in (1, 2)]
    wanted = [(clip.facts.source, clip.latents) for part in parts for clip in read_shards(part)]
    join(tmp_path / "whole", parts)
    found = [(clip.facts.source, clip.latents) for clip in read_shards(tmp_path / "whole")]
    assert [source for source, _ in found] == [source for source, _ in wanted]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, wanted, strict=True))
    assert open_shards(tmp_path / "whole").empty_text() is not None
    assert not any(part.exists() for part in parts)
    with pytest.raises(T3Error, match="holds a data set already"):
        join(tmp_path / "whole", [write_clips(tmp_path / "third", 1, seed=3)])
    with ShardWriter(tmp_path / "other", facts={"size": "64x64"}) as writer:
        writer.skip("a.mp4", "damaged")
    with pytest.raises(T3Error, match="cannot be one data set"):
        join(tmp_path / "mixed", [tmp_path / "third", tmp_path / "other"])
    assert open_shards(tmp_path / "third").clips and not (tmp_path / "mixed").exists()
