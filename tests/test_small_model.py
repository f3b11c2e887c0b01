"""The small model's world: scenes, pictures, captions, and the detector that reads pictures."""

import numpy as np
import pytest
import torch

from tools.small_model.captions import caption, stated, words
from tools.small_model.detector import detect, judge
from tools.small_model.encode import batches
from tools.small_model.evaluate import jobs, row, summary
from tools.small_model.render import HIGH, LOW, render
from tools.small_model.scenes import (
    ASPECT,
    HELD_MOTIONS,
    HELD_THINGS,
    LONGEST,
    MOTIONS,
    RELATIONS,
    SPEED,
    SPLITS,
    STRIP,
    Marker,
    Scene,
    Thing,
    scene,
    scenes,
)

TINY = (112, 160)
SQUARE = Scene(
    (Thing("square", "red", 0.2, 0.0),),
    "large",
    "left",
    "black",
    None,
    Marker(0.6, 0.1, 0.01),
    frozenset({"size", "motion", "background"}),
)


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_combinations_are_in_their_split_alone(split):
    drawn = scenes(split, 0, 250)
    seen = {(thing.colour, thing.shape) for one in drawn for thing in one.things} & HELD_THINGS
    moved = {(thing.shape, one.motion) for one in drawn for thing in one.things} & HELD_MOTIONS
    assert (seen, moved) == ((HELD_THINGS, HELD_MOTIONS) if split == "held" else (set(), set()))
    text = " ".join(caption(one) for one in drawn)
    assert ("yellow triangle" in text) == (split == "held")


def test_training_has_every_word_and_the_default_prompt():
    captions = {caption(one) for one in scenes("train", 0, 600)}
    assert {word for text in captions for word in text.replace(",", " ,").split()} >= set(words()) - {"one", "."}
    plain = Scene(**{**vars(SQUARE), "size": "small", "said": frozenset({"motion"})})
    assert caption(plain) == "a red square moving left" and not plain.held_out


def test_hard_scenes_are_more_often_pairs_and_threes_and_else_like_others():
    shares = {}
    for split in ("train", "hard"):
        drawn = scenes(split, 0, 1000)
        kinds = ["pair" if one.relation else len(one.things) for one in drawn]
        shares[split] = {kind: kinds.count(kind) / 1000 for kind in ("pair", 1, 2, 3)}
    usual, hard = shares["train"], shares["hard"]
    expected = {kind: 0.53 * share for kind, share in usual.items()}
    expected["pair"] += 0.35
    expected[3] += 0.12
    # Two counts of 1,000 each, of which the first is scaled: four standard errors of at most 0.016 * 1.13.
    assert hard == pytest.approx(expected, abs=0.073)
    assert hard["pair"] > usual["pair"] + 0.1


def test_a_scene_is_the_same_in_any_order():
    assert scenes("train", 5, 3) == [scene("train", i) for i in (5, 6, 7)]
    assert scene("train", 5) != scene("test", 5)


def test_nothing_touches_or_leaves():
    drawn = scenes("train", 0, 60)
    strip = round(STRIP * TINY[0])
    for one in drawn:
        still = Scene(one.things, one.size, one.motion, "black", None, Marker(0, 9, 0), one.said)
        for time in (0, LONGEST - 1):
            picture = render([still], TINY, 1, first=[time])[0, :, 0]
            bright = picture.amax(0) > -0.89
            assert bright.any() and not bright[:, :strip].any() and not bright[:, -strip:].any()
            assert not bright[0].any() and not bright[-1].any()


def test_things_stand_in_line_and_related_ones_on_their_sides_of_the_middle():
    drawn = scenes("hard", 0, 200)
    assert {len(one.things) for one in drawn} == {1, 2, 3}
    for one in drawn:
        x, y = np.array([(thing.x, thing.y) for thing in one.things]).T
        row, column = np.ptp(y) < 1e-9, np.ptp(x) < 1e-9
        assert row or column
        if one.relation:
            axis = np.array(RELATIONS[one.relation])
            for time in (0, LONGEST - 1):
                first, second = (np.array([x, y]).T + np.array(MOTIONS[one.motion]) * SPEED * time) @ axis
                assert first > 0.02 and second < -0.02
        elif len(one.things) > 1:
            assert column if one.motion in ("left", "right") else row or one.motion not in ("up", "down")
            gaps = np.diff(x + y)
            np.testing.assert_allclose(gaps, gaps[0])


def test_rendering_is_deterministic_and_anti_aliased():
    some = scenes("train", 0, 3)
    once, again = render(some, TINY, 5), render(some, TINY, 5)
    assert once.shape == (3, 3, 5, *TINY) and torch.equal(once, again)
    torch.testing.assert_close(render(some[1:2], TINY, 5)[0], once[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(render(some, TINY, 3, first=[2, 2, 2]), once[:, :, 2:], rtol=0, atol=1e-5)
    # Averaging a picture of twice the size gives this one, but for the corners of shapes.
    double = render(some[:1], (224, 320), 1)
    coarse = torch.nn.functional.avg_pool2d(double[:, :, 0], 2)
    assert (coarse - once[:1, :, 0]).abs().max() < 0.35
    assert len(once[0, 0, 0].unique()) > 8


def test_sizes_have_the_shape_scenes_are_made_for():
    assert all(width / height == ASPECT for height, width in (HIGH, LOW, TINY))


def test_captions_say_what_is_stated():
    assert caption(SQUARE) == "a large red square moving left on a black background"
    assert caption(SQUARE, frames=1) == "a large red square on a black background"
    pair = Scene(
        (Thing("cross", "blue", -0.2, 0), Thing("circle", "green", 0.2, 0)),
        "small",
        "still",
        "gray",
        "left of",
        Marker(0, 0, 0),
        frozenset({"motion"}),
    )
    assert caption(pair) == "a blue cross left of a green circle, both standing still"
    assert stated(pair)["count"] is None and stated(pair)["other colour"] == "green"


def test_detector_reads_real_clips():
    right, total = {}, {}
    drawn = scenes("test", 0, 40) + scenes("held", 0, 15)
    for one in drawn:
        measured = detect(render([one], TINY, 5)[0])
        result = {**judge(measured, one, everything=True), "agreement": measured.agreement}
        for name, value in result.items():
            right[name] = right.get(name, 0) + value
            total[name] = total.get(name, 0) + 1
    assert set(total) == {"count", "colour", "shape", "size", "motion", "background", "relation", "agreement"}
    assert {name: total[name] - right[name] for name in total} == dict.fromkeys(total, 0)


def test_detector_refutes_what_is_not_there():
    clip = render([SQUARE], TINY, 9)[0]
    measured = detect(clip)
    assert measured.things == {"red": (1, "square")} and measured.motion == "left" and measured.size == "large"

    def wrong(**changes):
        result = judge(measured, Scene(**{**vars(SQUARE), **changes}))
        return {name for name, value in result.items() if not value}

    assert wrong() == set()
    assert wrong(things=(Thing("circle", "red", 0, 0),)) == {"shape"}
    assert wrong(things=(Thing("square", "green", 0, 0),)) == {"colour", "shape"}
    assert wrong(things=SQUARE.things * 2) == {"count"}
    assert wrong(size="small") == {"size"}
    assert wrong(motion="right") == wrong(motion="turning") == {"motion"}
    assert wrong(background="white") == {"background"}
    assert wrong(motion="right", said=frozenset()) == set()
    # Backwards in time it moves right; still it stands still.
    assert detect(clip.flip(1)).motion == "right"
    assert detect(clip[:, :1].expand(-1, 9, -1, -1)).motion == "still"
    empty = detect(torch.full((3, 5, *TINY), -1.0))
    assert empty.things == {} and empty.motion is None and not empty.agreement


def test_detector_reads_relations_and_turning():
    pair = (Thing("triangle", "blue", -0.25, 0.05), Thing("square", "red", 0.2, 0.0))
    measured = detect(
        render([Scene(pair, "small", "turning", "white", "left of", Marker(0.1, 0, 0), frozenset())], LOW, 9)[0]
    )
    assert measured.motion == "turning" and measured.things == {"red": (1, "square"), "blue": (1, "triangle")}
    assert measured.relations == {("blue", "red"): "left of", ("red", "blue"): "right of"}


def test_agreement_is_between_the_edges_and_over_time():
    def clip(hue, y, speed):
        return render(
            [Scene(SQUARE.things, "large", "left", "black", None, Marker(hue, y, speed), frozenset())], TINY, 9
        )

    base = clip(0.6, 0.1, 0.01)[0]
    middle = TINY[1] // 2

    def halves(other):
        return detect(torch.cat((base[..., :middle], other[0][..., middle:]), -1))

    assert halves(clip(0.62, 0.11, 0.01)).agreement
    assert not halves(clip(0.75, 0.1, 0.01)).agreement
    assert not halves(clip(0.6, -0.05, 0.01)).agreement
    assert not halves(clip(0.6, 0.1, -0.024)).agreement
    # One marker missing, and both changing their hue on the way.
    assert not halves(clip(0.6, 9, 0)).agreement
    changing = torch.cat((base[:, :4], clip(0.1, 0.1, 0.01)[0][:, 4:]), 1)
    assert not detect(changing).agreement
    # Specks of one hue all over are no markers.
    specks = torch.where(torch.rand(1, 9, *TINY) < 0.5, base[:, :1, 55:56, 10:11], -torch.ones(3, 1, 1, 1))
    assert not detect(specks).agreement


def test_batches_hold_every_clip_once_and_one_length_each():
    made = batches(10, 101, 4, {21: 0.7, 13: 0.2, 1: 0.1}, still=2)
    assert sorted(i for _, numbers in made for i in numbers) == list(range(10, 111))
    counts = {length: sum(len(n) for found, n in made if found == length) for length in (21, 13, 1)}
    assert abs(counts[21] - 70) < 5 and abs(counts[13] - 20) < 4
    lengths = {i: length for length, numbers in made for i in numbers}
    more = {i: length for length, numbers in batches(50, 300, 8, {21: 0.7, 13: 0.2, 1: 0.1}) for i in numbers}
    assert all(lengths[i] == more[i] for i in range(50, 111))


def test_summary_counts_attributes_where_they_are_stated():
    work = jobs("test", 3, 2, 9)
    assert len(work) == 6 and len({seed for *_, seed in work}) == 6
    measured = detect(render([SQUARE], TINY, 9)[0])
    rows = [row(0, 0, SQUARE, measured, 9), row(1, 0, Scene(**{**vars(SQUARE), "motion": "up"}), measured, 9)]
    found = summary(rows)
    assert (found["all"], found["motion"], found["shape"], found["agreement"]) == (50.0, 50.0, 100.0, 100.0)
    assert "relation" not in found
