"""Tile maths: pure Python, against a count of every pixel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vae_fixtures import NAMES, config

from t3.vae.structure import read_structure
from t3.vae.tiles import Reach, Span, Window, axis_spans, cores, cut, halo, split
from t3.weights import known_config
from t3.weights.layout_vae import vae_layout


def structure(name, found=known_config):
    return read_structure({key: param.shape for key, param in vae_layout(found(name)).items()})


@pytest.mark.parametrize("name", NAMES)
def test_both_decoders_look_thirteen_latents_far(name):
    for found in (known_config, config):
        shape = structure(name, found)
        assert halo(shape.reach, shape.head_radius) == 13


@pytest.mark.parametrize("name", NAMES)
def test_the_halo_shrinks_level_by_level(name):
    shape = structure(name)
    core = Span(100, 101, 400).scaled(8)
    spans = axis_spans(core, shape.reach, shape.head_radius)
    at = [100 * 2**level for level in range(4)]
    assert [(first - level[0].start, first - level[-1].start) for first, level in zip(at, spans, strict=True)] == [
        (13, 7),
        (12, 6),
        (10, 4),
        (7, 1),
    ]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(0, 2)), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(1, 12),
    st.data(),
)
def test_spans_are_the_pixels_that_matter(levels, head, size, data):
    """Against sets of pixels, walked back one layer at a time."""
    reach = [Reach(tuple(blocks), radius) for blocks, radius in levels]
    reach[-1] = Reach(reach[-1].blocks, None)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    scale = 2 ** (len(reach) - 1)
    spans = axis_spans(Span(start, stop, size).scaled(scale), reach, head)

    def reached(pixels, radius, length):
        return {p + d for p in pixels for d in range(-radius, radius + 1) if 0 <= p + d < length}

    length, pixels = size * scale, set(range(start * scale, stop * scale))
    pixels = reached(pixels, head, length)
    for level, found in zip(reversed(reach), reversed(spans), strict=True):
        if level.resample is not None:
            pixels, length = {p // 2 for p in reached(pixels, level.resample, length)}, length // 2
        for radius, span in zip((*reversed(level.blocks), 0), reversed(found), strict=True):
            assert (set(range(span.start, span.stop)), span.size) == (pixels, length)
            pixels = reached(pixels, radius, length)


@given(st.integers(1, 300), st.integers(1, 300))
def test_an_axis_is_cut_evenly(size, most):
    spans = cut(size, most)
    assert [p for span in spans for p in range(span.start, span.stop)] == list(range(size))
    lengths = {span.length for span in spans}
    assert max(lengths) <= most and max(lengths) - min(lengths) <= 1
    assert len(spans) == -(-size // most)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_pieces_of_tiles_cover_the_picture_once(height, width, rows, cols):
    found = [piece for core in cores(height, width, (9, 7)) for piece in split(core, (rows, cols))]
    pixels = [
        (y, x)
        for piece in found
        for y in range(piece.rows.start, piece.rows.stop)
        for x in range(piece.cols.start, piece.cols.stop)
    ]
    assert sorted(pixels) == [(y, x) for y in range(height) for x in range(width)]
    assert all(piece.rows.length <= rows and piece.cols.length <= cols for piece in found)
    assert all((piece.rows.size, piece.cols.size) == (height, width) for piece in found)


def test_windows_place_themselves():
    outer = Window(Span(2, 9, 20), Span(0, 20, 20))
    inner = Window(Span(4, 6, 20), Span(3, 5, 20))
    assert inner.inside(outer) == (..., slice(2, 4), slice(3, 5))
    assert outer.here == (..., slice(2, 9), slice(0, 20))
    assert inner.grown(5).rows == Span(0, 11, 20) and inner.area == 4
