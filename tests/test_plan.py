import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3 import Grid, Partition, Plan
from t3.errors import T3Error
from t3.plan import EACH, axis_classes
from t3.plan_facts import layer_facts

# The authors' released schedules (window counts, and tokens per window), for 81 frames of 2176 x 3840.
RELEASED = {
    "wan2.1-4k": (
        (21, 136, 240),
        [(21, 1, 1), (1, 17, 30), (1, 8, 40), (3, 17, 8), (7, 8, 6)],
        [32_640, 1_344, 2_142, 1_680, 2_040],
    ),
    "wan2.2-4k": (
        (21, 68, 120),
        [(21, 1, 1), (1, 17, 20), (1, 17, 6), (3, 4, 15), (7, 4, 8)],
        [8_160, 504, 1_680, 952, 765],
    ),
}
SIZES = {
    "480p": (81, 480, 832),
    "720p": (81, 704, 1280),
    "1080p": (81, 1088, 1920),
    "1440p": (81, 1440, 2560),
    "4k portrait": (81, 3840, 2176),
    "4k square": (81, 2176, 2176),
    "one 4k frame": (1, 2176, 3840),
    "8k": (81, 4352, 7680),
    "321 frames": (321, 2176, 3840),
}
PIXELS_PER_TOKEN = {"wan2.1-4k": 16, "wan2.2-4k": 32}
# Layers 1 to 4 on grids that are not the plan's own. A change of these changes what tuned weights compute.
FITTED = {
    ("wan2.1-4k", (21, 30, 52)): [(1, 4, 7), (1, 2, 9), (3, 4, 2), (7, 2, 1)],
    ("wan2.1-4k", (21, 68, 120)): [(1, 9, 15), (1, 4, 20), (3, 9, 4), (7, 4, 3)],
    ("wan2.1-4k", (21, 240, 136)): [(1, 30, 17), (1, 15, 23), (3, 30, 4), (7, 15, 3)],
    ("wan2.1-4k", (1, 136, 240)): [(1, 4, 12), (1, 2, 15), (1, 9, 4), (1, 6, 5)],
    ("wan2.1-4k", (81, 136, 240)): [(1, 23, 48), (1, 11, 60), (12, 17, 8), (27, 8, 6)],
    ("wan2.2-4k", (21, 22, 40)): [(1, 6, 7), (1, 6, 2), (3, 1, 5), (7, 1, 3)],
    ("wan2.2-4k", (21, 45, 80)): [(1, 12, 14), (1, 12, 4), (3, 3, 10), (7, 3, 5)],
    ("wan2.2-4k", (81, 68, 120)): [(1, 23, 30), (1, 23, 10), (12, 4, 15), (27, 4, 8)],
}
grids = st.builds(Grid, st.integers(1, 90), st.integers(1, 140), st.integers(1, 250))


@pytest.mark.parametrize("name", RELEASED)
def test_presets_reproduce_the_released_schedule(name):
    grid, counts, tokens = RELEASED[name]
    plan = Plan.preset(name)
    for layer in range(30):
        partition = plan.partition(layer, grid)
        assert partition == counts[layer % 5]
        assert partition.window_classes(Grid(*grid)) == [(math.prod(partition), tokens[layer % 5])]


def token_bounds(plan, layer, grid):
    home = plan.grid.tokens / plan.partition(layer, plan.grid).windows
    sizes = [size for _, size in plan.partition(layer, grid).window_classes(grid)]
    return min(sizes) / home, max(sizes) / home


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RELEASED)
def test_windows_keep_their_tokens_on_common_sizes(name, size):
    frames, height, width = SIZES[size]
    step = PIXELS_PER_TOKEN[name]
    grid = Grid.from_video(frames, height // step * step, width // step * step, step)
    plan = Plan.preset(name)
    assert plan.partition(0, grid) == (grid.t, 1, 1)
    for layer in range(1, 5):
        plan.partition(layer, grid).check(grid)
        smallest, largest = token_bounds(plan, layer, grid)
        whole = grid.tokens * plan.partition(layer, plan.grid).windows / plan.grid.tokens
        assert largest <= 2
        assert smallest >= min(0.5, whole)


@pytest.mark.parametrize(("name", "grid"), FITTED)
def test_plans_are_fitted_to_other_sizes_as_ever(name, grid):
    assert Plan.preset(name).partitions(grid, 5)[1:] == FITTED[name, grid]


@pytest.mark.parametrize(("channels", "name"), [(16, "wan2.1-4k"), (48, "wan2.2-4k")])
def test_the_released_plan_goes_by_the_latents(channels, name):
    assert Plan.for_latent_channels(channels) is Plan.preset(name)


@given(grids, st.sampled_from(list(RELEASED)), st.integers(0, 60))
@settings(max_examples=150)
def test_every_grid_gets_a_legal_partition(grid, name, layer):
    plan = Plan.preset(name)
    partition = plan.partition(layer, grid)
    partition.check(grid)
    assert partition == plan.partition(layer + 5, grid)
    if layer % 5 == 0:
        assert partition == (grid.t, 1, 1)
    else:
        assert token_bounds(plan, layer, grid)[1] <= 2


def test_a_grid_smaller_than_half_a_window_is_dense():
    assert Plan.preset("wan2.1-4k").partition(2, (2, 8, 8)) == (1, 1, 1)
    assert Plan.preset("dense").partition(7, (21, 136, 240)) == (1, 1, 1)


@given(st.integers(1, 300), st.data())
def test_axis_classes_are_those_of_array_split(length, data):
    count = data.draw(st.integers(1, length))
    sizes = [len(part) for part in np.array_split(np.arange(length), count)]
    assert [size for n, size in axis_classes(length, count) for _ in range(n)] == sizes
    assert len(axis_classes(length, count)) <= 2


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.data())
def test_coinciding_groupings_are_recognised(t, h, w, data):
    grid = Grid(t, h, w)
    counts = [data.draw(st.integers(1, length)) for length in grid]

    def groups(kind):
        return {tuple(sorted(part)) for part in kind}  # as sets of positions, since the order of groups does not matter

    same = all(
        groups(map(tuple, np.array_split(np.arange(n), c))) == groups(range(g, n, c) for g in range(c))
        for n, c in zip(grid, counts, strict=True)
    )
    assert Partition(*counts).coincides(grid) == same


plans = st.builds(
    lambda name, layers: Plan(name, Grid(9, 9, 9), tuple(layers)),
    st.text(max_size=20),
    st.lists(st.tuples(*[st.one_of(st.integers(1, 9), st.just(EACH))] * 3), min_size=1, max_size=6),
)


@given(plans)
def test_json_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.partitions((4, 5, 6), 7) == plan.partitions((4, 5, 6), 7)


@given(plans)
def test_on_its_own_grid_a_plan_has_the_counts_it_states(plan):
    stated = [tuple(9 if count == EACH else count for count in layer) for layer in plan.layers]
    assert plan.partitions(plan.grid, len(stated)) == stated


GOOD = {"t3_plan": 1, "name": "mine", "grid": [2, 4, 6], "layers": [[1, 2, 3]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t3_plan": 2}, "version 2"),
        ({"grid": [2, 4]}, "three numbers"),
        ({"grid": [2, 0, 6]}, "grid's h is 0"),
        ({"grid": [True, 4, 6]}, "grid's t is True"),
        ({"grid": None}, "grid is None"),
        ({"layers": []}, "no layers"),
        ({"layers": "all"}, "list of"),
        ({"layers": [[1, 2]]}, "layer 0"),
        ({"layers": [[1, 2, 3], [1, 2, 7]]}, r"layer 1 .* 7 windows along w .* Nearest: 6"),
        ({"layers": [[1, "some", 3]]}, "axis h, is 'some'"),
        ({"layers": [[1, 2.0, 3]]}, "axis h, is 2.0"),
        ({"layers": [[True, 2, 3]]}, "axis t, is True"),
        ({"name": 3}, "name is 3"),
        ({"window": 3}, "unknown fields"),
    ],
)
def test_a_broken_plan_is_named(change, words):
    with pytest.raises(T3Error, match=words):
        Plan.from_json(json.dumps({**GOOD, **change}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ("{", "not JSON"),
        ("[1]", 'no "t3_plan" field'),
        ('{"grid": [1,1,1]}', 'no "t3_plan" field'),
        ('{"t3_plan": 1}', "lacks the field 'grid'"),
        ('{"t3_plan": 1, "grid": [1,1,1]}', "lacks the field 'layers'"),
    ],
)
def test_text_that_is_no_plan(text, words):
    with pytest.raises(T3Error, match=words):
        Plan.from_json(text)


def test_facts_name_the_layers_of_the_model_that_share_a_partition():
    plan, grid = Plan.preset("wan2.1-4k"), Grid(21, 136, 240)
    facts = [layer_facts(i, partition, grid, 12, 5) for i, partition in enumerate(plan.partitions(grid, 5))]
    assert [fact["layers"] for fact in facts] == [[0, 5, 10], [1, 6, 11], [2, 7], [3, 8], [4, 9]]
    assert [(fact["windows"], fact["tokens_per_window"], fact["branches"]) for fact in facts[:2]] == [
        (21, [32_640], 1),
        (510, [1_344], 2),
    ]


def test_unknown_preset_lists_the_known():
    with pytest.raises(T3Error, match="wan2.1-4k, wan2.2-4k, dense"):
        Plan.preset("wan3")


@pytest.mark.parametrize(
    ("frames", "height", "width", "words"),
    [
        (80, 2176, 3840, "frames is 80.*Nearest: 81"),
        (0, 2176, 3840, "frames is 0.*Nearest: 1"),
        (81, 2160, 3840, None),
        (81, 2170, 3840, "height is 2170.*multiple of 16.*Nearest: 2176"),
        (81, 2176, 7, "width is 7.*Nearest: 16"),
        (81, -16, 3840, "height is -16"),
    ],
)
def test_video_sizes(frames, height, width, words):
    if words is None:
        assert Grid.from_video(frames, height, width, 16) == (21, 135, 240)
    else:
        with pytest.raises(T3Error, match=words):
            Grid.from_video(frames, height, width, 16)
