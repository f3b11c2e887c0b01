"""How `auto` goes by times: the shipped ones, this machine's own, and tuning. On cards that are not there."""

import dataclasses
import json
import logging

import pytest
import torch

from t3.backends import BACKENDS, Situation, __main__, choice, choose, registry, table, tuning
from t3.errors import T3Error

H100 = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class Card(Situation):
    """A situation on a card that is not there."""

    name: str = H100
    number: tuple[int, int] = (9, 0)

    @property
    def capability(self):
        return self.number

    @property
    def card(self):
        return self.name


def on_card(*windows, **changes):
    return Card(
        **{"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 128, "windows": windows, **changes}
    )


def entry(window=1_000, ms=None, **changes):
    base = {
        **{"card": "Card", "capability": (9, 0), "dtype": "bfloat16", "head_dim": 128, "window": window},
        **{"windows": 32, "heads": 8, "ms": ms or {"sdpa-cudnn": 2.0, "sdpa-flash": 3.0}, "failed": {}},
        **{"versions": table.versions(), "date": "2026-01-02", "source": "a test"},
    }
    return table.Entry(**{**base, **changes})


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """All packages but flash-attn-4's are there; a cache folder of its own; nothing remembered; no clock runs."""
    state = {"missing": {"flash_attn.cute"}, "capturing": False}
    monkeypatch.setenv("T3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "installed", lambda package: package not in state["missing"])
    monkeypatch.setattr(registry, "_torch_allows", lambda check, s: True)
    monkeypatch.setattr(registry, "version", lambda package: "2.2.0")
    registry._sage_keys_multiple.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(tuning, "_left", tuning.SECONDS)
    choice._remembered.cache_clear()
    table._tell.cache_clear()
    yield state
    choice._remembered.cache_clear()
    registry._sage_keys_multiple.cache_clear()


@pytest.fixture
def timer(monkeypatch):
    """What each backend is said to take, in ms; an exception is raised. `calls`: what was timed."""

    class Timer:
        def __init__(self):
            self.ms, self.calls = {}, []

        def __call__(self, backend, s, windows, window, heads):
            self.calls.append((backend.name, window))
            taken = self.ms.get(backend.name, 9.0)
            if isinstance(taken, Exception):
                raise taken
            return taken

    made = Timer()
    real = tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: real(*a, **{"timer": made, **k}))
    return made


def test_the_shipped_table_is_sound_and_says_where_it_comes_from():
    entries = table.read(table.SHIPPED)
    assert {entry.window for entry in entries} >= {32_640, 1_344, 2_142, 1_680, 2_040}
    for found in entries:
        assert set(found.ms) | set(found.failed) <= set(BACKENDS)
        assert found.versions and found.date and found.source


def test_on_a_measured_card_the_window_decides(machine, timer):
    machine["missing"] = set()
    backend, why = choose("auto", on_card(32_640))
    assert backend.name == "flash-attn-4"
    assert "measured on this kind of card, 21 x 32,640 tokens, 12 heads: flash-attn-4 197 ms, sdpa-cudnn 214 ms" in why
    # In between: the same power of two, the nearest of them.
    assert "2,142 tokens" in choose("auto", on_card(2_500))[1]
    assert not timer.calls


def test_all_windows_of_a_plan_decide_together_and_near_times_are_equal(machine, timer):
    machine["missing"] = set()
    times = {32_640: (11.0, 10.0), 2_048: (10.15, 10.0), 512: (10.0, 11.0)}
    own_times = [
        entry(window, {"sdpa-cudnn": cudnn, "flash-attn-4": flash}, card=H100, windows=1)
        for window, (cudnn, flash) in times.items()
    ]
    table.save(own_times, table.cache_file())
    assert choose("auto", on_card(32_640))[0].name == "flash-attn-4"
    # 1.5 % apart is nothing.
    backend, why = choose("auto", on_card(2_048))
    assert backend.name == "sdpa-cudnn" and "times within 3% count as equal" in why
    assert choose("auto", on_card(32_640, 32_640, 512))[0].name == "sdpa-cudnn"
    assert choose("auto", on_card(*[32_640] * 200, 512))[0].name == "flash-attn-4"
    assert not timer.calls


def test_what_is_usable_but_was_not_measured_is_named(timer):
    backend, why = choose("auto", on_card(1_344))
    assert backend.name == "sdpa-cudnn"
    assert "passed over flash-attn-4 (the package flash_attn.cute is not installed)" in why
    assert "flash-attn-3 is left out (was not timed; python -m t3.backends --measure times it)" in why
    assert not timer.calls


def test_8_bit_backends_are_taken_only_where_asked_for_and_faster(timer):
    backend, why = choose("auto-int8", on_card(1_344))
    assert backend.name == "sdpa-cudnn"
    assert "sage 23.1 ms" in why and "the 8-bit ones lose here" in why
    ms = {"sdpa-flash": 5.0, "sdpa-cudnn": 6.0, "sage": 2.0, "comfy-kitchen-int8": 2.5}
    table.save([entry(ms=ms, capability=(8, 9))], table.cache_file())
    card = on_card(1_000, name="Card", number=(8, 9))
    assert choose("auto", card)[0].name == "sdpa-flash"
    backend, why = choose("auto-int8", card)
    assert backend.name == "sage" and "sage computes in 8 bits and is not exact" in why
    exact = dataclasses.replace(card, needs_grad=True)
    assert choose("auto-int8", exact)[0].exact
    # Without times there is no reason to leave exactness.
    assert choose("auto-int8", on_card())[0].name == "sdpa-cudnn"
    assert choose("auto-int8", Situation(torch.device("cpu"), torch.float32, 64))[0].name == "sdpa"


def test_several_windows_are_served_by_the_least_total(machine):
    machine["missing"] = {"flash_attn.cute", "flash_attn_interface"}
    slow_when_long = entry(8_000, {"sdpa-cudnn": 9.0, "sdpa-flash": 4.0}, windows=4)
    table.save([entry(1_000, {"sdpa-cudnn": 2.0, "sdpa-flash": 3.0}), slow_when_long], table.cache_file())
    assert choose("auto", on_card(1_000, name="Card"))[0].name == "sdpa-cudnn"
    assert choose("auto", on_card(1_000, 8_000, name="Card"))[0].name == "sdpa-flash"
    assert choose("auto", on_card(*[1_000] * 6, 8_000, name="Card"))[0].name == "sdpa-cudnn"


def test_a_new_card_is_timed_once_and_remembered(machine, timer, caplog):
    machine["missing"] = set()
    timer.ms = {
        "sdpa-cudnn": 13.6,
        "sdpa-flash": 10.0,
        "flash-attn-2": ValueError("no kernel\nfor this"),
        "sdpa-efficient": 30,
    }
    card = on_card(700, name="New card", number=(12, 0))
    with caplog.at_level(logging.INFO):
        backend, why = choose("auto", card)
    assert backend.name == "sdpa-flash"
    assert "46 x 700 tokens, 8 heads: sdpa-flash 10 ms, sdpa-cudnn 13.6 ms, sdpa-efficient 30 ms" in why
    assert "flash-attn-2 is left out (ValueError: no kernel;" in why
    assert "flash-attn-4 is left out (compiles for longer than tuning may take;" in why
    assert "timing attention backends for windows of 700 tokens, once" in caplog.text
    assert [name for name, _ in timer.calls] == ["sdpa-cudnn", "sdpa-flash", "flash-attn-2", "sdpa-efficient"]
    # The next process, and a window of about this length, need no clock.
    choice._remembered.cache_clear()
    assert choose("auto", card) == (backend, why)
    assert choose("auto", dataclasses.replace(card, windows=(600,)))[0].name == "sdpa-flash"
    assert len(timer.calls) == 4
    # Nor does the other half precision. Another length, head size or card does.
    assert choose("auto", dataclasses.replace(card, dtype=torch.float16))[0].name == "sdpa-flash"
    assert len(timer.calls) == 4
    for change in ({"windows": (3_000,)}, {"head_dim": 64}, {"name": "Other"}):
        timer.calls.clear()
        choose("auto", dataclasses.replace(card, **change))
        assert timer.calls


@pytest.mark.parametrize("passing", [torch.OutOfMemoryError("CUDA out of memory"), "late"])
def test_what_failed_for_want_of_memory_or_time_is_tried_again_in_the_next_process(monkeypatch, timer, passing):
    """A card that was full, or slow, the first time must not do without its fastest backend for good."""
    late = passing == "late"
    timer.ms = {"sdpa-flash": 10, "sdpa-cudnn": 5 if late else passing, "sdpa-efficient": 30, "flash-attn-2": 20}
    card = on_card(700, name="New card", number=(12, 0))
    if late:
        monkeypatch.setattr(tuning, "_left", 1e-9)
        first = tuning.tune(card, 700, ["sdpa-flash", "sdpa-cudnn"], clock=iter([0.0, 0.0, 1.0, 2.0]).__next__)
        assert first.failed == {"sdpa-cudnn": "no time was left"}
        table.remember(first)
    else:
        assert choose("auto", card)[0].name == "sdpa-flash"
    choice._remembered.cache_clear()
    monkeypatch.setattr(tuning, "_left", tuning.SECONDS)
    timer.calls.clear()
    timer.ms["sdpa-cudnn"] = 5
    backend, why = choose("auto", card)
    assert backend.name == "sdpa-cudnn" and "left out (OutOf" not in why
    assert ("sdpa-cudnn", 700) in timer.calls and ("sdpa-flash", 700) not in timer.calls
    timer.calls.clear()
    choice._remembered.cache_clear()
    assert choose("auto", card)[0].name == "sdpa-cudnn" and not timer.calls


def test_of_several_times_those_of_the_most_backends_then_those_of_the_dtype_count():
    few, other = entry(ms={"sdpa-cudnn": 2.0, "sdpa-flash": 1.0}, dtype="float16"), entry()
    table.save([few, other], table.cache_file())
    here = on_card(1_000, name="Card", dtype=torch.float16)
    assert (
        table.find(here, 1_000) == few and table.find(dataclasses.replace(here, dtype=torch.bfloat16), 1_000) == other
    )
    assert table.find(dataclasses.replace(here, dtype=torch.float32), 1_000) is None
    more = entry(ms={"sdpa-cudnn": 2.0, "sdpa-flash": 3.0, "flash-attn-4": 1.0})
    table.save([more], table.cache_file())
    assert table.find(here, 1_000) == more
    nearer = entry(window=1_100, ms={"sdpa-cudnn": 2.0, "sdpa-flash": 3.0, "flash-attn-4": 1.5})
    table.save([nearer], table.cache_file())
    assert table.find(here, 1_100) == nearer


def test_times_of_other_versions_do_not_count(timer, monkeypatch):
    table.save([entry(versions={**table.versions(), "torch": "1.0"})], table.cache_file())
    choose("auto", on_card(1_000, name="Card"))
    assert timer.calls


def test_tuning_ends_after_its_seconds_for_the_whole_process(monkeypatch, timer):
    now = iter(range(100))
    monkeypatch.setattr(tuning, "_left", 1.5)
    found = tuning.tune(on_card(60), 60, ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient"], clock=lambda: float(next(now)))
    assert list(found.ms) == ["sdpa-cudnn"]
    assert found.failed == {"sdpa-flash": "no time was left", "sdpa-efficient": "no time was left"}
    assert tuning.tune(on_card(60), 60, ["sdpa-cudnn"]) is None
    backend, why = choose("auto", on_card(60))
    assert backend.name == "sdpa-cudnn"
    assert "windows of 60 tokens were not measured on this kind of card, and the 3 s for tuning are used up" in why


def test_where_nothing_runs_the_order_decides_and_nothing_is_kept(timer):
    timer.ms = dict.fromkeys(BACKENDS, RuntimeError("CUDA out of memory"))
    backend, why = choose("auto", on_card(60))
    assert backend.name == "sdpa-cudnn" and "nothing was measured; sdpa-cudnn is left out (RuntimeError" in why
    assert not table.cache_file().exists()


def test_nothing_is_timed_with_gradients_in_a_graph_or_in_compiled_code(machine, timer, monkeypatch):
    assert choose("auto", on_card(60, needs_grad=True))[0].name == "sdpa-cudnn"
    machine["capturing"] = True
    assert "this is no time to tune" in choose("auto", on_card(60))[1]
    # What was measured is used all the same.
    assert "measured on this kind of card" in choose("auto", on_card(1_344))[1]
    machine["capturing"] = False
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose("auto", on_card(60))[0].name == "sdpa-cudnn"
    monkeypatch.undo()
    assert not timer.calls


def test_a_cache_that_cannot_be_read_is_ignored_in_one_sentence(timer, caplog):
    path = table.cache_file()
    path.parent.mkdir(parents=True)
    good = dataclasses.asdict(entry())
    for broken in ("{", "3", "[3]", '{"a": 1}', "[{}]", json.dumps([{**good, "ms": {"sdpa": "fast"}}]), "\udcff"):
        path.write_bytes(broken.encode("utf-8", "surrogateescape"))
        table._tell.cache_clear()
        caplog.clear()
        assert table.read(path) == [] == table.read(path)
        assert caplog.text.count("is no table of attention times") == 1
    # It is replaced when there is something to keep.
    table.remember(entry())
    assert table.read(path) == [entry()]


def test_a_cache_that_cannot_be_written_is_said_once(timer, caplog, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("T3_CACHE", str(tmp_path / "file"))
    for window in (60, 5_000):
        choose("auto", on_card(window))
    assert caplog.text.count("times of attention backends are not kept") == 1


def test_the_cache_goes_there_and_back(tmp_path):
    path = tmp_path / "deep" / "table.json"
    first, second = entry(), entry(2_000, failed={"sage": "boom"})
    table.save([first, second], path)
    assert table.read(path) == [first, second]
    newer = entry(ms={"sdpa-cudnn": 1.0})
    table.save([newer], path)
    assert table.read(path) == [newer, second]
    assert table.read(tmp_path / "none.json") == []


def test_the_command_explains_per_window(capsys):
    assert __main__.main(["--window", "1680", "2142", "--dtype", "fp32", "--head-dim", "64"]) == 0
    out = capsys.readouterr().out
    assert "sdpa-math" in out and "auto for windows of 2,142 tokens takes" in out
    assert __main__.main(["--window", "0"]) == 2
    assert "0 is no number of tokens" in capsys.readouterr().err
    assert __main__.main(["--out", "times.json"]) == 2
    assert "is for what --measure finds" in capsys.readouterr().err


def test_the_command_measures_and_keeps(timer, capsys, tmp_path, machine):
    machine["missing"] = set()
    timer.ms = {"sdpa-math": AssertionError("builds the scores"), "sage": RuntimeError("no")}
    out = tmp_path / "out.json"
    __main__.measure(on_card(), [700, 750], out)
    printed = capsys.readouterr().out
    assert "46 x 700 tokens, 8 heads: " in printed and "flash-attn-4 9 ms" in printed
    assert "sage failed: RuntimeError: no" in printed
    assert [found.window for found in table.read(out)] == [700, 750]
    assert table.read(out) == table.read(table.cache_file())
    with pytest.raises(T3Error, match="needs an NVIDIA card, and this is cpu"):
        __main__.measure(Situation(torch.device("cpu"), torch.float32, 64), [700], None)
    assert {32_640, 8_160, 2_142, 504} <= set(__main__.preset_windows())


def test_real_times_leave_the_user_s_random_numbers_alone(device, monkeypatch):
    if device == "cpu":
        pytest.skip("no GPU")
    monkeypatch.undo()
    situation = Situation(torch.device("cuda"), torch.float16, 64, windows=(256,))
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    found = tuning.tune(situation, 256, ["sdpa-flash", "sdpa-efficient", "sdpa-math"], seconds=30.0)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (torch.cuda.get_rng_state(), torch.get_rng_state()), strict=True)
    )
    assert found.ms and all(ms > 0 for ms in found.ms.values())


def test_a_text_is_attended_by_an_exact_one_without_times(timer):
    from t3.text_attention import backend_for_text

    backend_for_text.cache_clear()
    try:
        for keys in (257, 512):
            for name in ("sdpa-flash", "sdpa-cudnn"):
                assert backend_for_text(BACKENDS[name], on_card(keys)) == (BACKENDS[name], None)
            for name in ("sage", "comfy-kitchen-int8"):
                found, why = backend_for_text(BACKENDS[name], on_card(keys))
                assert found is BACKENDS["sdpa-cudnn"] and why == f"{name} computes in 8 bits"
        assert not timer.calls
    finally:
        backend_for_text.cache_clear()
