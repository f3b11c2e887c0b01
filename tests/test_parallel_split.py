"""How ranks share the work: what is legal, what is fastest, and what is said where nothing is."""

import itertools
import json

import pytest
import torch
from parallel_fixtures import ROOT

from t3.bench.scaling import Measured
from t3.errors import T3Error
from t3.parallel.split import Split, Task, choose, facts, legal_splits, line, refusal

TOKENS = 685_440
TASK = Task(heads=12, tokens=TOKENS)


def test_places_are_all_different_and_sequences_stand_side_by_side():
    split = Split(2, 2, 3)
    places = [split.place(rank) for rank in range(split.size)]
    assert sorted(places) == list(itertools.product(range(2), range(2), range(3)))
    assert [part for _, _, part in places[:3]] == [0, 1, 2]


@pytest.mark.parametrize(("tokens", "ranks"), [(105, 2), (105, 4), (7, 7), (685_440, 3), (101, 8)])
def test_shares_are_those_of_tensor_split(tokens, ranks):
    expected = [len(part) for part in torch.arange(tokens).tensor_split(ranks)]
    assert Split(1, 1, ranks).shares(tokens) == expected


def test_auto_leaves_no_rank_without_work():
    for size, heads, clips, guided in itertools.product(range(1, 17), (12, 24, 40), (1, 3, 16), (True, False)):
        task = Task(heads, TOKENS, guided, clips)
        try:
            split, why = choose("auto", size, task)
        except T3Error as error:
            assert not legal_splits(size, task)
            # What is named instead is legal.
            near = [int(word.strip(".")) for word in str(error).rpartition("start ")[2].split(" or ")]
            assert near and all(legal_splits(n, task) for n in near)
            continue
        assert split.size == size and why
        assert refusal(split, task) is None
        assert split.cost(task) == min(other.cost(task) for other in legal_splits(size, task))


@pytest.mark.parametrize(
    ("size", "task", "expected"),
    [
        (1, TASK, Split()),
        (2, TASK, Split(1, 2, 1)),  # predictions meet once a step, tokens four times a layer
        (2, Task(12, TOKENS, guided=False), Split(1, 1, 2)),
        (8, TASK, Split(1, 2, 4)),
        (4, Task(12, TOKENS, clips=16), Split(4, 1, 1)),
        (4, Task(12, TOKENS, clips=3), Split(1, 2, 2)),  # by prompts, one round would have a rank without one
        (3, TASK, Split(1, 1, 3)),
    ],
)
def test_auto_takes_the_fastest(size, task, expected):
    assert choose("auto", size, task)[0] == expected


def test_the_estimate_is_what_two_cards_were_measured_to_give():
    older, newer = (
        Measured.read([ROOT / "benchmarks" / name])
        for name in ("older/parallel_4k_2_h100.json", "parallel_4k_2_h200.json")
    )
    for splits, one, two in (
        (Split(1, 2, 1), older.forward, older.guidance),
        (Split(1, 1, 2), newer.forward, newer.sequence),
    ):
        times = (2 if splits.guidance == 2 else 1) * one["1.3b"] / two["1.3b", 2]
        # As many figures as the constants have.
        assert Split().cost(TASK) / splits.cost(TASK) == pytest.approx(times, abs=0.001)


def test_what_is_asked_for_is_taken():
    assert choose("sequence=2, guidance=2", 4, TASK)[0] == Split(1, 2, 2)


@pytest.mark.parametrize(
    ("text", "size", "task", "words"),
    [
        ("sequence=2", 4, TASK, "start 2"),
        ("sequence=5", 5, TASK, "Nearest: sequence=6"),
        ("sequence=6", 6, Task(12, 5), "Nearest: sequence=4"),  # one token each at least
        ("guidance=3", 3, TASK, "guidance=2"),
        ("guidance=2", 2, Task(12, TOKENS, guided=False), "guidance=1"),
        ("data=4", 4, Task(12, TOKENS, clips=3), "use data=3"),
        ("ring=2", 2, TASK, "Use sequence=N"),
        ("tensor=2", 2, TASK, "not understood"),
        ("sequence=2,sequence=2", 4, TASK, "not understood"),
        ("sequence=0", 2, TASK, "not understood"),
        ("", 2, TASK, "not understood"),
        ("auto", 5, TASK, "start 4 or 6"),
    ],
)
def test_what_cannot_be_names_the_nearest_that_can(text, size, task, words):
    with pytest.raises(T3Error, match=words.replace("=", "\\=")):
        choose(text, size, task)


def test_facts_count_every_rank_and_token():
    found = facts(Split(2, 2, 2), "as chosen", 105)
    assert json.loads(json.dumps(found)) == found
    assert found["ranks"] == len(found["tokens_per_rank"]) == 8
    assert sum(found["tokens_per_rank"]) == 4 * 105
    assert "53 or 52 tokens" in line(found)
