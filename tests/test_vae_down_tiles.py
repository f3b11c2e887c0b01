"""Windows of an encode: what is read from the weights, and pure Python maths against a count of every pixel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vae_fixtures import NAMES, SCALE, config

from t3.vae.down_structure import read_down_structure
from t3.vae.down_tiles import DownReach, beyond, doubled, down_halo, down_spans
from t3.vae.tiles import Span
from t3.weights import known_config
from t3.weights.layout_vae import vae_layout


@pytest.mark.parametrize(
    ("name", "generation", "channels", "patch"), [(NAMES[0], "2.1", 16, 1), (NAMES[1], "2.2", 48, 2)]
)
@pytest.mark.parametrize("found", [known_config, config])
def test_the_structure_is_read_from_the_weights(found, name, generation, channels, patch):
    structure = read_down_structure({key: param.shape for key, param in vae_layout(found(name)).items()})
    assert structure.generation == f"Wan{generation}"
    assert (structure.latent_channels, structure.patch, structure.scale) == (channels, patch, SCALE[name])
    assert [len(level.blocks) for level in structure.levels] == [2, 2, 2, 2]
    assert [level.downsample and level.downsample.temporal for level in structure.levels] == [False, True, True, None]
    assert [structure.latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert down_halo(structure.reach, structure.first_radius) == (61, 68)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(2, 4)), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(1, 12),
    st.data(),
)
def test_spans_are_the_pixels_that_matter(levels, first, size, data):
    """Against sets of pixels, walked back one layer at a time."""
    reach = [DownReach(tuple(blocks), kernel) for blocks, kernel in levels]
    reach[-1] = DownReach(reach[-1].blocks, None)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    picture, spans = down_spans(Span(start, stop, size), reach, first)

    def reached(pixels, offsets, length, stride=1):
        return {stride * p + d for p in pixels for d in offsets if 0 <= stride * p + d < length}

    length, pixels = size, set(range(start, stop))
    for level, found in zip(reversed(reach), reversed(spans), strict=True):
        if level.kernel is not None:
            asked = {2 * p + d for p in pixels for d in range(level.kernel)}
            small, length = Span(min(pixels), max(pixels) + 1, length), 2 * length
            pixels = reached(pixels, range(level.kernel), length, 2)
            assert beyond(small, level.kernel) == len([p for p in asked if p >= length])
            assert doubled(small, level.kernel).start % 2 == 0
        for radius, span in zip((*reversed(level.blocks), 0), reversed(found), strict=True):
            assert (set(range(span.start, span.stop)), span.size) == (pixels, length)
            pixels = reached(pixels, range(-radius, radius + 1), length)
    assert set(range(picture.start, picture.stop)) == reached(pixels, range(-first, first + 1), length)
