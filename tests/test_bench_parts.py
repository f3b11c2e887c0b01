"""The parts of `t3.bench` that its figures hang on: ratios, truths, peers, masks, scaling."""

from __future__ import annotations

import random
import re

import pytest
import torch
from bench_fixtures import UNCOMPILED
from bench_fixtures import on_cpu as on_cpu
from torch.utils.flop_counter import FlopCounterMode
from vae_fixtures import one_thread as one_thread

from t3.backends import BACKENDS, Backend
from t3.bench import attention, decode, growth, plots
from t3.bench.cases import EPS, SMALL, TINY, WAN21, Case, LayerInputs
from t3.bench.exact import exact_tokens, relative_error
from t3.bench.flex import block_tables, flex_windows
from t3.bench.machine import Ceilings
from t3.bench.released import released_attention
from t3.bench.report import Report
from t3.bench.tables import table
from t3.bench.transformer import Transformer
from t3.cost import ModelShape, activation_bytes
from t3.errors import T3Error
from t3.kernels.attention import naive
from t3.memory import shares
from t3.plan import Grid
from t3.weights import known_config
from t3.windows import groupings, window_indices

CPU = torch.device("cpu")


# Comparisons


@pytest.fixture
def report(on_cpu, monkeypatch):
    monkeypatch.setattr("t3.bench.report.measure_ceilings", lambda *_: Ceilings(500.0, 2.0))
    return Report(["attention"])


def test_ratios_are_to_the_floor_and_the_peers_of_the_same_case(report):
    report.run("t", "other", "dense", lambda: {"ms": 1.0}, peer=True)
    report.run("t", "a", "floor", lambda: {"ms": 10.0})
    report.run("t", "a", "dense", lambda: {"ms": 200.0}, peer=True)
    report.run("t", "a", "not a peer", lambda: {"ms": 400.0})
    row = report.run("t", "a", "ours", lambda: {"ms": 40.0})
    assert row["percent_of_floor"] == 25.0
    assert row["times_as_fast_as"] == {"dense": 5.0}
    printed = table(report.data, "t", "a")
    assert "| ours | 40 | 25 | 5 |" in printed
    assert "matmul 500 TFLOP/s | copy 2 TB/s" in printed


def test_the_floor_is_the_multiplications_at_the_ceiling():
    case = Case("one window", SMALL, Grid(2, 6, 10), 2, 64)
    # Layer 0: two windows of 60 tokens, computed once; two products of 128 channels.
    assert case.layer_macs(0) == 2 * 2 * 60 * 60 * 128
    assert Ceilings(500.0, 2.0).floor_ms(case.layer_macs(0)) == pytest.approx(2 * 2 * 2 * 60 * 60 * 128 / 500e12 * 1e3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_floor_of_windows_of_several_sizes_counts_every_pair(head_dim):
    case = Case("odd", SMALL, Grid(3, 5, 7), 3, head_dim)
    for layer, partition in enumerate(case.partitions):
        pairs = sum(
            windows * size**2
            for kind in groupings(case.grid, partition)
            for windows, size in (
                index.shape for index in window_indices(tuple(case.grid), tuple(partition), kind, CPU)
            )
        )
        # Of each head and pair: a product with a key, and one with a value.
        assert case.layer_macs(layer) == 2 * pairs * 3 * head_dim


@pytest.mark.parametrize("name", decode.VAES)
def test_the_floor_of_a_decode_is_what_it_multiplies(name):
    """Counted by torch on another program's decoder, without data; every latent frame after the first is alike."""
    diffusers = pytest.importorskip("diffusers")
    _, (channels, height, width) = decode.VAES[name]
    with torch.device("meta"), torch.inference_mode():
        model = diffusers.AutoencoderKLWan(**decode.vae_settings(name)).eval()
        counts = []
        for frames in (1, 2):
            with FlopCounterMode(display=False) as counter:
                model.decode(torch.empty(1, channels, frames, height, width))
            counts.append(counter.get_total_flops())
    flops = counts[0] + (decode.LATENT_FRAMES - 1) * (counts[1] - counts[0])
    assert decode.WORK[name] == pytest.approx(flops, rel=1e-3)


def test_diffusers_decode_is_timed_after_one_that_is_not(report, monkeypatch):
    """Else its import, seconds, would be its own where no other row ran before."""
    pytest.importorskip("diffusers")
    report.tiny = True
    calls = []

    def by_diffusers(sd, latents, *_, tiled=False, **__):
        calls.append(("run", latents.numel(), tiled))
        return latents

    def held_to(work, *_):
        calls.append("timed")
        work()
        return {"seconds": 1.0}

    monkeypatch.setattr(decode, "by_diffusers", by_diffusers)
    monkeypatch.setattr(decode, "held_to", held_to)
    report.only = ["diffusers"]
    decode._speed(report, "2.1", decode.random_vae("2.1", True), "small")
    whole = decode.random_latents("2.1", 2, 32).numel()
    assert [call if call == "timed" else call[1:] for call in calls[:3]] == [(whole, True), "timed", (whole, True)]
    assert len(calls) == 6 and calls[4] == "timed"


# The truth, and the released semantics


def truth_of_all(inputs, partition):
    """Norm and rotation in float64 as complex numbers, then the readable definition."""
    turn = torch.complex(*(table.double() for table in inputs.turns))[:, :, None]

    def prepare(x, weight):
        x = x.double()
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        pairs = x.unflatten(-1, (inputs.case.heads, -1, 2))
        return torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * turn).flatten(3)

    q, k = (prepare(x, w) for x, w in zip(inputs.qkv, inputs.norms, strict=False))
    v = inputs.heads[2].double()
    return naive.t3_attention_reference(q, k, v, inputs.case.grid, partition).flatten(2)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_sampled_tokens_in_float64_are_the_definition_s(case):
    inputs = LayerInputs(case, CPU)
    tokens = list(range(0, case.grid.tokens, 7))
    for partition in case.partitions:
        truth = truth_of_all(inputs, partition)[0, tokens]
        assert relative_error(exact_tokens(inputs, partition, tokens), truth) < 1e-14


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_the_released_peer_equals_the_truth(dtype, most):
    """Its norm is in float32 whatever it gets: 2^-24 for each of a few roundings; bfloat16 rounds at 2^-8."""
    case = TINY[0]
    inputs = LayerInputs(case, CPU, dtype)
    for partition in case.partitions:
        calls = []

        def attend(q, k, v, scale, calls=calls):
            calls.append(q.shape)
            return BACKENDS["sdpa"].attend(q, k, v, scale)

        found = attention.released(inputs, partition, Backend("counting", "counts", attend))
        truth = truth_of_all(inputs, partition)
        assert found.dtype == dtype
        assert relative_error(found, truth) < most
        # Both groupings always, also where they coincide; all windows of one at once.
        tokens = case.grid.tokens
        assert [shape[0] * shape[1] for shape in calls] == [tokens, tokens]
        assert calls[0][0] == partition.windows


def test_the_released_peer_cannot_cut_what_does_not_divide():
    inputs = LayerInputs(TINY[1], CPU)
    how = {"heads": 2, "norms": inputs.norms, "eps": EPS, "turns": inputs.turns, "backend": BACKENDS["sdpa"]}
    with pytest.raises(T3Error, match="divide"):
        released_attention(*inputs.qkv, TINY[1].grid, (2, 2, 2), **how)


def test_all_paths_of_a_layer_agree():
    inputs = LayerInputs(TINY[0], CPU)
    backend = BACKENDS["sdpa"]
    for partition in TINY[0].partitions:
        truth = truth_of_all(inputs, partition)
        assert relative_error(attention.fused(inputs, partition, backend), truth) < 2e-6
        assert relative_error(attention.step_by_step(inputs, partition, backend), truth) < 2e-6


# FlexAttention's mask


@pytest.mark.parametrize("seed", range(8))
def test_block_tables_hold_what_trying_all_pairs_finds(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 12))]
    block = draw.choice([1, 4, 16, 32])
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    partly, fully = block_tables(ids, block)
    same = ids[:, None] == ids[None]
    count = -(-len(ids) // block)
    for row in range(count):
        for column in range(count):
            here = same[row * block : (row + 1) * block, column * block : (column + 1) * block]
            whole = bool(here.all()) and here.shape == (block, block)
            assert bool(fully[row, column]) == whole
            assert bool(partly[row, column]) == (bool(here.any()) and not whole)


@UNCOMPILED
def test_flex_attention_attends_inside_windows_only():
    sizes = torch.tensor([130, 61, 200])
    ids = torch.arange(3).repeat_interleave(sizes)
    q, k, v = torch.randn(3, 1, 391, 2, 16, generator=torch.Generator().manual_seed(4)).unbind(0)
    found = flex_windows(ids)(q, k, v)
    parts = [
        naive.dense_attention(*some) for some in zip(*(x.split(sizes.tolist(), 1) for x in (q, k, v)), strict=True)
    ]
    assert relative_error(found, torch.cat(parts, 1)) < 2e-6


# Growth


def test_dense_layers_that_take_too_long_are_computed(report, monkeypatch):
    times = iter([100.0])
    monkeypatch.setattr(growth, "dense_layer", lambda *_, **__: next(times))
    monkeypatch.setattr(growth, "t3_layer", lambda case, _: (50.0, case.heads))
    growing = growth._Growth(report, None, dense_s=0.2)
    forwards = {5: 2.0, 1: 6.0}  # of the cycle's layers, and of a dense one
    monkeypatch.setattr(growing, "_forward", lambda grid, plan, layers, **_: {"forward_s": forwards[layers]})
    growing.rows("480p")
    growing.rows("720p")
    rows = {row["variant"]: row for row in report.data["rows"]}
    first, second = rows["480p, dense"], rows["720p, dense"]
    assert first["attention_ms"] == 100.0 and "computed" not in first
    # (75,600 / 32,760)^2 times 100 ms is more than 0.2 s.
    assert (first["tokens"], second["tokens"]) == (32_760, 75_600)
    assert second["computed"] == "yes" and second["attention_ms"] == pytest.approx(
        100 * (75_600 / 32_760) ** 2, rel=5e-3
    )
    assert first["over_t3_attention"] == 2.0 and first["over_t3_forward"] == 3.0
    printed = table(report.data, growth.TABLE, growth._label(report))
    assert "| attention over T3's |" in printed and "| forward over T3's |" in printed
    assert second["over_t3_attention"] == pytest.approx(second["attention_ms"] / 50, rel=5e-3)


def test_a_model_that_does_not_fit_says_what_it_needs(report, monkeypatch):
    class TooLarge:
        shape = ModelShape.from_config(known_config("wan2.1-t2v-1.3b"))
        model = None

        def measure_part(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Nothing:
        def remove(self):
            pass

    monkeypatch.setattr("t3.processor.install_t3", lambda *_: Nothing())
    monkeypatch.setattr(growth, "t3_layer", lambda *_: (50.0, 6))
    found = growth._Growth(report, TooLarge(), dense_s=0.2)._t3(Case("8k", WAN21, Grid(21, 270, 480), 12))
    needed = int(re.fullmatch(r"out of memory: needs at least (\d+) GiB beside the weights", found["forward"])[1])
    leanest = activation_bytes(TooLarge.shape, 21 * 270 * 480, share=shares(12)[-1])
    assert needed == round(leanest / 2**30) > 20
    assert found["attention_ms"] == 50.0 and found["heads_measured"] == 6


def test_a_part_of_a_model_is_scaled_to_all_of_it(on_cpu, monkeypatch):
    transformer = Transformer("1.3b", CPU, tiny=True)
    seen = []

    def measure(grid, *, warm=True):
        seen.append(len(transformer.model.blocks))
        return {"seconds": 1.0 + 0.2 * seen[-1]}

    monkeypatch.setattr(transformer, "measure", measure)
    assert transformer.measure_part(Grid(2, 4, 6), 2)["seconds"] == pytest.approx(1.0 + 0.2 * 5)
    assert seen == [0, 2] and len(transformer.model.blocks) == transformer.shape.layers == 5


def test_computed_points_are_drawn_dashed():
    rows = [
        {"mode": mode, "size": size, "tokens": tokens, "attention_ms": ms, **more}
        for mode, size, tokens, ms, more in [
            ("dense", "480p", 100, 1.0, {}),
            ("dense", "720p", 200, 4.0, {}),
            ("dense", "8k", 400, 16.0, {"computed": "yes"}),
            ("T3", "480p", 100, 1.0, {}),
            ("T3", "8k", 400, 4.0, {}),
        ]
    ]
    (axis,) = plots._growth(rows).axes
    lines = {line.get_label(): line for line in axis.lines}
    assert set(lines) == {"dense", "dense, computed", "T3"}
    assert lines["dense"].get_linestyle() == "-" and list(lines["dense"].get_xdata()) == [100, 200]
    assert lines["dense, computed"].get_linestyle() == "--"
    assert list(lines["dense, computed"].get_xdata()) == [200, 400]
