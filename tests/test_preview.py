"""What the preview draws is what T3 attends, and the picture is one that can be looked at."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3 import Grid, Partition, Plan
from t3.attended import attended, attended_count, token_at
from t3.cost import ModelShape
from t3.errors import T3Error
from t3.kernels.attention.naive import local_groups, strided_groups, windows
from t3.preview import (
    BOTH,
    COLOURS,
    LOCAL,
    MAPS,
    MOST_ROWS,
    NOTHING,
    STRIDED,
    cell_size,
    chosen_frames,
    draw_plan,
    frame_map,
    row_texts,
)
from t3.preview import _row as row_of

MODEL = ModelShape(layers=30, dim=1536, ffn_dim=8960, heads=12)
RELEASED = Plan.preset("wan2.1-4k")
GRID_4K = Grid(21, 136, 240)


@st.composite
def cases(draw, most=11):
    """A grid, a partition of it that need not divide it, and a token."""
    grid = Grid(*(draw(st.integers(1, most)) for _ in range(3)))
    partition = Partition(*(draw(st.integers(1, length)) for length in grid))
    token = tuple(draw(st.integers(0, length - 1)) for length in grid)
    return grid, partition, token


def kinds_by_definition(grid, partition, token):
    """For every token of the grid, whether the reference puts it into a window with `token`: uint8 `[T, H, W]`."""
    t, h, w = token
    index = (t * grid.h + h) * grid.w + w
    kinds = np.zeros(grid.tokens, np.uint8)
    for kind, groups in ((LOCAL, local_groups), (STRIDED, strided_groups)):
        (window,) = (found for found in windows(grid, partition, groups) if index in found)
        kinds[window] |= kind
    return kinds.reshape(grid)


@given(cases())
def test_attended_tokens_are_those_of_the_reference(case):
    grid, partition, token = case
    axes = attended(grid, partition, token)
    kinds = np.zeros(grid, np.uint8)
    for kind, name in ((LOCAL, "local"), (STRIDED, "strided")):
        t, h, w = (getattr(axis, name) for axis in axes)
        kinds |= kind * (t[:, None, None] & h[:, None] & w).astype(np.uint8)
    expected = kinds_by_definition(grid, partition, token)
    assert np.array_equal(kinds, expected)
    assert attended_count(axes) == np.count_nonzero(expected)
    assert kinds[token] == BOTH


@pytest.mark.parametrize("cell", [4, 5, 9, 24])
@settings(max_examples=60)
@given(case=cases(7))
def test_every_drawn_token_has_the_colour_of_what_it_is(cell, case):
    grid, partition, token = case
    axes = attended(grid, partition, token)
    expected = COLOURS[kinds_by_definition(grid, partition, token)]
    for t in range(grid.t):
        picture = frame_map(axes, t, cell)
        assert picture.shape == (grid.h * cell, grid.w * cell, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture[cell // 2 :: cell, cell // 2 :: cell], expected[t])


@pytest.mark.parametrize("cell", [1, 2, 3])
@settings(max_examples=60)
@given(case=cases(40))
def test_small_tokens_are_never_lost_and_windows_never_hidden(cell, case):
    """A lone token is drawn larger than it is; the colour of what is attended is still the right one in its place."""
    grid, partition, token = case
    axes = attended(grid, partition, token)
    picture = frame_map(axes, token[0], cell)[cell // 2 :: cell, cell // 2 :: cell]
    expected = kinds_by_definition(grid, partition, token)[token[0]]
    drawn = {tuple(colour): kind for kind, colour in enumerate(COLOURS.tolist())}
    kinds = np.array([[drawn[tuple(pixel)] for pixel in line] for line in picture.tolist()])
    assert np.array_equal(kinds & expected, expected)


def test_the_drawn_picture_holds_the_maps():
    """From the finished picture: the colours of each kind have the area that the reference says."""
    plan = Plan("test", Grid(1, 6, 9), ((1, 4, 4),))
    token = (0, 3, 2)
    image = np.asarray(draw_plan(plan, plan.grid, token, MODEL, "a model"))
    kinds = kinds_by_definition(plan.grid, Partition(1, 4, 4), token)
    cell = cell_size(plan.grid, 1)
    inner = (cell - 1) ** 2
    for kind in (LOCAL, STRIDED):
        area = np.all(image == COLOURS[kind], axis=-1).sum()
        legend = 24 * 24
        assert area == np.count_nonzero(kinds == kind) * inner + legend
    # The ring covers some of the token itself.
    both = np.all(image == COLOURS[BOTH], axis=-1).sum() - 24 * 24
    tokens = np.count_nonzero(kinds == BOTH)
    assert (tokens - 1) * inner < both < tokens * inner


@pytest.mark.parametrize(
    ("grid", "plan"),
    [
        (GRID_4K, "wan2.1-4k"),
        (Grid(21, 68, 120), "wan2.2-4k"),
        (Grid(1, 5, 7), "wan2.1-4k"),
        (Grid(2, 1, 1), "dense"),
        (Grid(11, 67, 119), "wan2.1-4k"),
        (Grid(21, 240, 136), "wan2.1-4k"),
        (Grid(61, 270, 480), "wan2.1-4k"),  # 8K
        (Grid(513, 1024, 1024), "wan2.1-4k"),
        (Grid(2049, 40, 2000), "wan2.1-4k"),
    ],
)
def test_any_grid_is_drawn_quickly_and_in_bounds(grid, plan):
    Plan.preset(plan).partitions(grid, 5)  # kept by the plan; not what is measured
    for token in ((0, 0, 0), token_at(grid, (0.5, 0.5, 0.5)), token_at(grid, (1, 1, 1))):
        start = time.perf_counter()
        image = draw_plan(Plan.preset(plan), grid, token, MODEL, "a model", title="a title")
        assert time.perf_counter() - start < 3
        assert image.mode == "RGB"
        assert 600 <= image.width <= 4000 and 400 <= image.height <= 7000
        pixels = np.asarray(image)
        # Nothing runs off an edge.
        paper = pixels[0, 0]
        assert all(np.all(edge == paper) for edge in (pixels[:20], pixels[-20:], pixels[:, :20], pixels[:, -20:]))


def test_labels_state_the_released_figures():
    expected = [
        ("21 x 1 x 1 windows", "32,640 tokens", "the same", "attends 32,640", "4.76%"),
        ("1 x 17 x 30 windows", "1,344 tokens", "local and strided windows", "attends 2,6", "0.39%"),
        ("1 x 8 x 40 windows", "2,142 tokens", "local and strided windows", "attends 4,2", "0.62%"),
        ("3 x 17 x 8 windows", "1,680 tokens", "local and strided windows", "attends 3,3", "0.49%"),
        ("7 x 8 x 6 windows", "2,040 tokens", "local and strided windows", "attends 4,0", "0.60%"),
    ]
    for layer, words in enumerate(expected):
        texts = row_texts(row_of(RELEASED, GRID_4K, (10, 68, 120), layer), RELEASED, GRID_4K, MODEL)
        assert texts[0] == f"Layer {layer}"
        for text, word in zip(texts[1:], words, strict=True):
            assert word in text


def test_labels_of_uneven_and_of_single_windows():
    plan = Plan("test", Grid(1, 5, 7), ((1, 2, 3), (1, 1, 1)))
    texts, whole = (row_texts(row_of(plan, plan.grid, (0, 0, 0), i), plan, plan.grid, MODEL) for i in (0, 1))
    assert "4 to 9 tokens in each" in texts
    assert "one window of 35 tokens" in whole and "full attention" in whole
    assert not any(re.search("local|strided", text) for text in whole)


@given(cases(9), st.integers(1, 4))
def test_frames_shown_are_in_order_and_tell_the_kinds_apart(case, count):
    grid, partition, token = case
    time_axis = attended(grid, partition, token)[0]
    frames = chosen_frames(time_axis, token[0], min(count, grid.t))
    assert frames == sorted(set(frames)) and len(frames) == min(count, grid.t)
    assert token[0] in frames
    kinds = LOCAL * time_axis.local.astype(int) + STRIDED * time_axis.strided.astype(int)
    if count >= MAPS:
        assert {LOCAL, STRIDED} & set(kinds.tolist()) <= {int(kinds[frame]) for frame in frames}


def test_layers_can_be_chosen_and_long_plans_are_cut():
    def height(**options):
        return draw_plan(long, long.grid, (0, 0, 0), MODEL, "a model", **options).height

    long = Plan("long", Grid(3, 8, 9), tuple((1, 1 + i % 8, 1 + i % 9) for i in range(40)))
    assert height(layers=[39]) < height(layers=[0, 39]) < height()
    assert height() == height(layers=range(MOST_ROWS + 1))
    with pytest.raises(T3Error, match="layers are counted from 0. Nearest: 0"):
        height(layers=[-2])


@pytest.mark.parametrize(
    ("fractions", "token"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((1, 1, 1), (20, 135, 239)),
        ((0.5, 0.5, 0.5), (10, 68, 120)),
        ((0.99, 0, 1), (20, 0, 239)),
    ],
)
def test_fractions_name_tokens(fractions, token):
    assert token_at(GRID_4K, fractions) == token


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: token_at(GRID_4K, (0.5, 1.5, 0)), "place in height is 1.5; give 0 (first) to 1 (last). Nearest: 1"),
        (lambda: token_at(GRID_4K, (-0.1, 0, 0)), "place in time is -0.1; give 0 (first) to 1 (last). Nearest: 0"),
        (lambda: token_at(GRID_4K, (0, 0, float("nan"))), "place in width is nan"),
        (lambda: attended(GRID_4K, Partition(1, 1, 1), (0, 136, 0)), "the token's h is 136; this grid has 0 to 135"),
        (lambda: attended(GRID_4K, Partition(22, 1, 1), (0, 0, 0)), "22 windows along t do not fit"),
    ],
)
def test_what_is_not_there_is_refused_in_words(call, words):
    with pytest.raises(T3Error, match=re.escape(words)):
        call()


def test_colours_differ_even_in_grey():
    grey = sorted(COLOURS[[NOTHING, LOCAL, STRIDED, BOTH]] @ np.array([0.299, 0.587, 0.114]))
    assert min(np.diff(grey)) > 20


def test_no_torch_is_needed():
    code = "import sys; sys.modules['torch'] = None; import t3.preview, t3.plan_facts"
    subprocess.run([sys.executable, "-c", code], check=True)
