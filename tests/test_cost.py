from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t3 import Grid, Partition, Plan
from t3.cost import ModelShape, activation_bytes, attention_pairs, macs_text, model_cost, saving_warning
from t3.kernels.attention.naive import local_groups, strided_groups, windows
from t3.memory import JOINED_BYTES, Share, joined_bytes, shares
from t3.weights import known_config

WAN_1_3B = ModelShape(layers=30, dim=1536, ffn_dim=8960, heads=12)


def test_the_paper_s_figures():
    cost = model_cost(WAN_1_3B, Plan.preset("wan2.1-4k"), (21, 136, 240))
    assert round(cost.attention_dense / 1e12) == 43_299
    assert round(cost.attention_released / 1e12) == 1_007
    assert round(cost.attention_t3 / 1e12) == 594
    assert cost.model_t3 == cost.attention_t3 + cost.other


@given(st.data())
def test_pairs_are_those_of_the_reference_s_windows(data):
    grid = Grid(*(data.draw(st.integers(1, 8)) for _ in range(3)))
    partition = Partition(*(data.draw(st.integers(1, n)) for n in grid))
    outside = data.draw(st.integers(0, 5))
    counted = [
        sum(len(w) * (len(w) + outside) for w in windows(grid, partition, kind))
        for kind in (local_groups, strided_groups)
    ]
    globals_ = outside * (grid.tokens + outside)
    assert attention_pairs(grid, partition, outside, released=True) == sum(counted) + globals_
    once = counted[0] if partition.coincides(grid) else sum(counted)
    assert attention_pairs(grid, partition, outside) == once + globals_


def test_a_reference_frame_is_dear():
    plan, grid = Plan.preset("wan2.1-4k"), (21, 136, 240)
    plain = model_cost(WAN_1_3B, plan, grid).attention_t3
    with_frame = model_cost(WAN_1_3B, plan, grid, global_tokens=136 * 240).attention_t3
    assert 7 < with_frame / plain < 11


def warning(plan, grid, global_tokens=0):
    cost = model_cost(WAN_1_3B, plan, grid, global_tokens=global_tokens)
    return saving_warning(cost.model_dense, cost.model_t3)


def test_where_t3_pays_nothing_is_said():
    assert warning(Plan.preset("wan2.1-4k"), (21, 136, 240)) is None
    assert warning(Plan.preset("wan2.1-4k"), (21, 30, 52)) is None


def test_a_clip_on_which_t3_saves_next_to_nothing_is_named():
    """One frame of 480p: all that is outside attention stays, and its windows are nearly the frame."""
    text = warning(Plan.preset("wan2.1-4k"), (1, 30, 52))
    assert "T3 saves only" in text and "larger or longer" in text and "Plan dense" in text
    shown = float(text.split("only ")[1].split("%")[0])
    cost = model_cost(WAN_1_3B, Plan.preset("wan2.1-4k"), (1, 30, 52))
    assert shown == pytest.approx(100 * (1 - cost.model_t3 / cost.model_dense), abs=0.05) and 0 <= shown < 10


def test_two_groupings_can_be_more_work_than_all_of_it():
    halves = Plan("halves", Grid(3, 30, 52), ((2, 1, 1),))  # 2 of 3 and 1 of 3 frames, twice: 10/9 of full attention
    assert "T3 makes" in warning(halves, (3, 30, 52)) and "more work" in warning(halves, (3, 30, 52))
    # As many tokens beside the grid as in it: each grouping attends them.
    quarters = Plan("quarters", Grid(21, 30, 52), ((1, 2, 2),))
    assert warning(quarters, (21, 30, 52)) is None
    assert "more work" in warning(quarters, (21, 30, 52), global_tokens=21 * 30 * 52)


def test_tokens_beside_the_grid_take_memory_of_their_own():
    tokens = 21 * 136 * 240
    for share in (None, *shares(WAN_1_3B.heads)):
        alone = activation_bytes(WAN_1_3B, tokens, share=share)
        more = activation_bytes(WAN_1_3B, tokens, share=share, beside=32_640) - alone
        assert 0 <= more <= JOINED_BYTES
    for share in shares(WAN_1_3B.heads)[:3]:  # where attention is the most that a block holds
        heads = WAN_1_3B.heads if share.heads is None else share.heads
        alone = activation_bytes(WAN_1_3B, tokens, share=share)
        queries = tokens * WAN_1_3B.dim * 2 * heads // WAN_1_3B.heads
        assert activation_bytes(WAN_1_3B, tokens, share=share, beside=9) - alone == joined_bytes(queries)
    cost = model_cost(WAN_1_3B, Plan.preset("wan2.1-4k"), (21, 136, 240), global_tokens=32_640)
    assert cost.activation_bytes == activation_bytes(WAN_1_3B, tokens + 32_640, beside=32_640)


def test_one_of_several_ranks_has_tables_of_its_own_tokens_and_attends_its_own_heads():
    shape = ModelShape.from_config(known_config("wan2.1-t2v-1.3b"))
    tokens, (two, three) = 100_000, (replace(shape, ranks=n) for n in (2, 3))
    assert (shape.own_heads, two.own_heads, three.own_heads) == (12, 6, 4)
    assert {s.head_dim for s in (shape, two, three)} == {128}
    # Blocks that run whole do not know of heads, so what ranks change is seen by itself.
    assert activation_bytes(two, tokens, share=None) == activation_bytes(shape, tokens, share=None)
    # As many heads at once are more of a rank's own, and take as much more of what it holds.
    assert activation_bytes(three, tokens, share=Share(4)) > activation_bytes(shape, tokens, share=Share(4))


def test_a_dense_plan_costs_what_dense_costs():
    cost = model_cost(WAN_1_3B, Plan.preset("dense"), (3, 30, 52), global_tokens=7)
    assert cost.attention_t3 == cost.attention_dense


def test_whole_model_matches_parameters_times_tokens():
    """Every weight of a linear layer is used once per token: an independent count of the dominant terms."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 3, "text_dim": 96}
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**config)
    tokens, text = 1000, 512
    expected = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("condition_embedder.time"):
            from_text = "attn2.to_k" in name or "attn2.to_v" in name or "text_embedder" in name
            expected += module.weight.numel() * (text if from_text else tokens)
    expected += model.patch_embedding.weight.numel() * tokens
    expected += 3 * 2 * tokens * text * 256  # cross-attention's products
    shape = ModelShape.from_config(model.config)
    cost = model_cost(shape, Plan.preset("dense"), (10, 10, 10))
    assert cost.other == expected


@pytest.mark.parametrize(
    "model, plan, grid, measured",
    [
        # Peak GiB of sampling less the weights that were on the card: benchmarks/headless_4k_h200.json.
        ("wan2.1-t2v-1.3b", "wan2.1-4k", (21, 136, 240), 32.1),
        ("wan2.2-ti2v-5b", "wan2.2-4k", (21, 68, 120), 13.8),
        ("wan2.1-t2v-14b", "wan2.1-4k", (21, 136, 240), 80.1),
    ],
)
def test_activation_memory_of_whole_blocks_is_near_what_was_measured(model, plan, grid, measured):
    """They were measured before blocks worked by chunks of tokens; compiled blocks still do not."""
    cost = model_cost(ModelShape.from_config(known_config(model)), Plan.preset(plan), grid, share=None)
    assert cost.activation_bytes / 2**30 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (43_299e12, "43,299 T"),
        (594e12, "594 T"),
        (2.5e12, "2.5 T"),
        (12.34e12, "12.3 T"),
        (0.9e12, "900 G"),
        (5e6, "0.005 G"),
    ],
)
def test_macs_are_written_without_exponents(macs, text):
    assert macs_text(int(macs)) == text
