"""Work shared over ranks: every rank has some, and the busiest little more than the mean."""

import random
from itertools import product

import pytest

from t3.vae.balance import assign, frame_shares, loads, longest, warm_up
from t3.vae.choice import Choice, best, choices, shared_choices, tile_costs
from t3.vae.down_plan import down_choices, down_tile_costs, shared_down_choices
from t3.vae.down_structure import read_down_structure
from t3.vae.structure import read_structure
from t3.vae.tiles import cores
from t3.weights import known_config
from t3.weights.layout_vae import vae_layout

NAMES = ("wan2.1-vae", "wan2.2-vae")
# Latents of a side at 2.1's eight pixels; half of it for 2.2.
SIZES = {"480p": (60, 104), "720p": (90, 160), "4K": (272, 480), "odd": (67, 121)}


def shapes(name: str) -> dict:
    plain = {key: value for key, value in known_config(name).items() if not key.startswith("_")}
    return {key: tuple(param.shape) for key, param in vae_layout(plain).items()}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_tile_leaves_no_rank_idle_and_none_much_longer(name, size, ranks):
    height, width = (side if name == NAMES[0] else -(-side // 2) for side in SIZES[size])
    ways = (
        (read_structure(shapes(name)), choices, shared_choices, tile_costs),
        (read_down_structure(shapes(name)), down_choices, shared_down_choices, down_tile_costs),
    )
    for structure, alone, shared, costs_of in ways:
        chosen = best(shared(structure, height, width, 2, ranks), 60 << 30)
        costs = costs_of(structure, height, width, chosen.tile)
        assert len(costs) == len(cores(height, width, chosen.tile))
        busy = loads(costs, ranks)
        assert all(busy)
        # `work` is in units of the untiled work, which is the cheapest single tile's.
        untiled = costs_of(structure, height, width, (height, width))
        assert len(untiled) == 1 and max(busy) / untiled[0] == pytest.approx(chosen.work)
        # A tile of a small picture is mostly halo, so that sharing saves less there, but it always saves.
        alone_work = best(alone(structure, height, width, 2), 60 << 30).work
        assert chosen.work < alone_work
        if size == "4K":
            # An encode's tiles need more around them: the whole way down looks farther than the way up.
            assert alone_work / chosen.work > (0.88 if costs_of is tile_costs else 0.74) * ranks


def test_no_choice_beats_the_one_taken():
    """Against a search of everything, without the bounds that spare most of it."""
    structure = read_structure(shapes(NAMES[0]))
    height, width, ranks = 30, 52, 3
    found = best(shared_choices(structure, height, width, 2, ranks), 60 << 30)
    untiled = tile_costs(structure, height, width, (height, width))[0]
    every = {
        tile: max(loads(tile_costs(structure, height, width, tile), ranks)) / untiled
        for tile in product(range(5, height + 1), range(5, width + 1))
    }
    assert found.work <= 1.01 * min(every.values())


def test_of_tiles_as_good_as_the_cheapest_that_fits_the_smallest_is_taken():
    sizes = {(8, 8): (1.0, 900), (4, 8): (1.005, 500), (4, 4): (1.008, 300), (2, 2): (1.3, 100)}
    found = [Choice(tile, work, lambda taken=taken: taken) for tile, (work, taken) in sizes.items()]
    assert [(best(found, memory) or found[0]).tile for memory in (1000, 499, 299)] == [(4, 4), (4, 4), (2, 2)]
    assert best(found, 99) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_after_a_doubling_of_time_is_twice_the_work(name):
    """And in an encode what comes before it."""
    costs = {}
    for temporal in (0, 1):
        times = [bool(temporal), False, False]
        plain = {key: value for key, value in known_config(name).items() if not key.startswith("_")}
        layout = vae_layout({**plain, "temperal_downsample": times})
        found = {key: tuple(param.shape) for key, param in layout.items()}
        costs[temporal] = (
            tile_costs(read_structure(found), 4, 4, (4, 4))[0],
            down_tile_costs(read_down_structure(found), 4, 4, (4, 4))[0],
        )
    # The last level of a decode, the first of an encode: its share of all work is doubled.
    assert all(1.1 < once / never < 2 for never, once in zip(costs[0], costs[1], strict=True))


def test_assignment_is_complete_and_within_grahams_bound():
    draw = random.Random(1)
    for _ in range(50):
        ranks = draw.randint(1, 9)
        costs = [draw.uniform(0.1, 5) for _ in range(draw.randint(1, 40))]
        owners = assign(costs, ranks)
        assert len(owners) == len(costs) and set(owners) <= set(range(ranks))
        assert len(set(owners)) == min(ranks, len(costs))
        busy = loads(costs, ranks)
        assert sum(busy) == pytest.approx(sum(costs))
        # Of the best possible, which is at least the mean and at least the dearest piece: within 4/3, and a list
        # schedule within its own last piece.
        assert max(busy) <= sum(costs) / ranks + max(costs)
        counts = [(cost, 1) for cost in costs]
        assert longest(counts, ranks) >= max(busy) - 1e-9
    assert longest([(1.0, 6), (2.0, 1)], 4) == 2.0
    assert longest([(1.0, 1000)], 3) == pytest.approx(1000 / 3 + 1), "a bound, where there are many"


@pytest.mark.parametrize(("frames", "ranks"), [(21, 2), (21, 4), (21, 8), (1, 3), (5, 8), (7, 7)])
def test_frames_are_shared_in_runs(frames, ranks):
    shares = frame_shares(frames, ranks)
    assert [frame for share in shares for frame in share] == list(range(frames))
    lengths = [len(share) for share in shares]
    assert len(lengths) == ranks and max(lengths) - min(lengths) <= 1
    for share in shares:
        for lookback in (4, 6):
            warm = warm_up(share, lookback, 3)
            assert warm.start % 3 == 0
            if share:
                assert warm.stop == share.start and (len(warm) >= lookback or warm.start == 0)
                assert len(warm) < lookback + 3
