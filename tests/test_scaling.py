"""The model of times on many GPUs: its arithmetic, its limits, and the tables made of it and of measurements."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from t3 import scaling
from t3.bench import __main__ as bench
from t3.bench.scaling import Measured, decode_seconds, models
from t3.bench.scaling_tables import BEGIN, END, _batch, clips, document
from t3.scaling import Clip, Model, busy_share, forward, layer_bytes, mean_wait, servers_needed, tensor_bytes

ROOT = Path(__file__).resolve().parent.parent
SMALL = Model("small", layers=4, width=96, heads=12, tokens=1000, forward=8.0, latent_bytes=500)
NOTHING = Measured()


def test_bytes_are_those_of_an_all_to_all():
    """Counted one by one: every rank sends each token's numbers of every head that is another rank's."""
    for ranks in SMALL.degrees:
        sent = sum(
            SMALL.width // SMALL.heads * SMALL.element
            for head in range(SMALL.heads)
            for token in range(SMALL.tokens)
            if token * ranks // SMALL.tokens == 0 and head * ranks // SMALL.heads != 0
        )
        own = sum(token * ranks // SMALL.tokens == 0 for token in range(SMALL.tokens))
        assert tensor_bytes(SMALL, ranks) * own * ranks / SMALL.tokens == pytest.approx(sent)
        assert layer_bytes(SMALL, ranks) == 4 * tensor_bytes(SMALL, ranks)
    assert layer_bytes(SMALL, 1) == 0 and SMALL.degrees == [1, 2, 3, 4, 6, 12]


def test_at_4k_each_of_two_ranks_sends_half_a_gigabyte_a_tensor():
    big, other = models(NOTHING)
    assert (big.tokens, big.heads, other.tokens, other.heads) == (685_440, 12, 171_360, 24)
    assert tensor_bytes(big, 2) == 685_440 * 1536 * 2 / 4


def test_what_is_sent_and_what_was_seen_beside_it_are_added():
    for ranks in SMALL.degrees[1:]:
        for speed in (1e3, 1e5, 1e9):
            in_turn = SMALL.forward / ranks + SMALL.layers * layer_bytes(SMALL, ranks) / speed
            assert forward(SMALL, ranks, speed) == pytest.approx(in_turn)
            seen = replace(SMALL, beside=scaling.beside(SMALL, ranks, 1.1 * in_turn, speed))
            assert forward(seen, ranks, speed) == pytest.approx(1.1 * in_turn)
            assert scaling.beside(SMALL, ranks, 0.9 * in_turn, speed) == 0


def test_where_sending_takes_as_long_as_computing():
    for ranks in SMALL.degrees[1:]:
        speed = scaling.enough_bandwidth(SMALL, ranks)
        assert forward(SMALL, ranks, speed) == pytest.approx(2 * SMALL.forward / ranks)


def test_guidance_halves_a_step():
    assert scaling.step(SMALL, 1, 1, 1e9) == 16.0
    assert scaling.step(SMALL, 2, 1, 1e9) == pytest.approx(8.0 + 500 / 1e9)


def test_a_clips_cost_and_the_rate_of_many():
    clip = Clip(gpus=8, sampling=70.0, decode=2.0, write=18.0)
    assert clip.seconds == 90 and clip.gpu_seconds == 720 and clip.cost(5.0) == pytest.approx(1.0)
    assert clip.per_hour(72) == pytest.approx(9 * 40) and clip.per_hour(7) == 0


def test_queues_are_erlangs():
    # One server: the share that waits is its load. Two servers at half: 1/3. A table's value: 10 servers at 8 Erlang.
    assert busy_share(1, 0.7) == pytest.approx(0.7)
    assert busy_share(2, 1.0) == pytest.approx(1 / 3)
    assert busy_share(10, 8.0) == pytest.approx(0.4092, abs=1e-4)

    def by_definition(servers: int, load: float) -> float:
        top = load**servers / math.factorial(servers) * servers / (servers - load)
        return top / (sum(load**k / math.factorial(k) for k in range(servers)) + top)

    for servers, load in ((3, 2.5), (7, 1.2), (20, 19.0)):
        assert busy_share(servers, load) == pytest.approx(by_definition(servers, load))
    with pytest.raises(ValueError, match="more than 3"):
        busy_share(3, 3.0)
    # One server with equal times (M/D/1): load x service / (2 (1 - load)).
    assert mean_wait(1, 0.5, 10.0) == pytest.approx(0.5 * 10 / (2 * 0.5))
    enough = servers_needed(1000, 600.0, 60.0)
    load = 1000 / 3600 * 600
    assert mean_wait(enough, load, 600.0) <= 60 < mean_wait(enough - 1, load, 600.0)
    assert busy_share(5000, 4900.0) < 1, "large pools do not overflow"


@pytest.fixture
def files(tmp_path):
    """What the two scripts write, with numbers that are known."""
    rows = [
        {"model": "1.3b", "case": "alone", "ranks": 2, "seconds": 6.0},
        {"model": "1.3b", "case": "sequence", "ranks": 2, "seconds": 3.6},
        {"model": "1.3b", "case": "sequence", "ranks": 2, "seconds": 3.4},
        {"model": "1.3b", "case": "sequence", "ranks": 2, "failed": "no memory"},
        {"model": "1.3b", "case": "guidance", "ranks": 2, "seconds": 6.1},
        {"model": "1.3b", "case": "all-to-all", "ranks": 2, "seconds": 0.002, "gb_per_s": 250.0},
    ]
    decode = [
        {"case": "decode 2.1", "row": "one rank", "ranks": 1, "seconds": 16.0},
        {"case": "decode 2.1", "row": "all ranks", "ranks": 2, "seconds": 8.5},
        {"case": "encode 2.1", "row": "one rank", "ranks": 1, "seconds": 9.0},
        {"case": "encode 2.1", "row": "all ranks", "ranks": 2, "seconds": 4.5},
    ]
    made = {"forward.json": rows, "decode.json": decode}
    for name, some in made.items():
        (tmp_path / name).write_text(json.dumps({"machine": {"machine": "a card"}, "rows": some}))
    runs = [{"gpus": 1, "clips_an_hour": 900.0}, {"gpus": 2, "clips_an_hour": 1700.0}, {"gpus": 2, "case": "killed"}]
    options = {"clips": 16, "frames": 5, "steps": 2}
    (tmp_path / "batch.json").write_text(json.dumps({"machine": {}, "options": options, "runs": runs}))
    return [*(tmp_path / name for name in made), tmp_path / "batch.json"]


def test_what_was_measured_takes_the_place_of_the_model(files):
    measured = Measured.read(files)
    model = models(measured)[0]
    assert model.forward == 6.0 and measured.bandwidth == 250e9 and measured.card == "a card"
    text = document(measured)
    assert "3.40 s, 1.76 m" in text and "1.97 times one GPU on 2" in text
    assert decode_seconds("2.1", 2, measured) == (8.5, "m")
    four, status = decode_seconds("2.1", 4, measured)
    assert status == "c" and 4.0 < four < 4.5
    assert "| 2 | guidance 2 | 300 c | 8.5 m |" in text
    # Two ranks take by the model what they were seen to take.
    assert forward(model, 2, 250e9) == pytest.approx(3.4)
    other = models(measured)[1]
    assert other.beside / other.layers / layer_bytes(other, 2) == pytest.approx(
        model.beside / model.layers / layer_bytes(model, 2)
    )
    assert "4.5 s, 2.00 m" in text and "| 2 | 1700 m | 1.89 m |" in text and "16 clips of 5 frames, 2 steps" in text


def written(path, rows, card="a card", **more):
    path.write_text(json.dumps({"machine": {"machine": card}, "rows": rows, **more}))
    return path


def test_times_one_gpu_are_those_of_the_same_run(files, tmp_path):
    """Another run's one GPU was slower or faster: no ratio is taken across runs, nor from a tile for many ranks."""
    slower = [
        {"model": "1.3b", "case": "alone", "ranks": 4, "seconds": 6.4},
        {"model": "1.3b", "case": "sequence", "ranks": 4, "seconds": 1.6},
        {"model": "1.3b", "case": "guidance", "ranks": 4, "seconds": 3.2},
    ]
    decode = [
        {"case": "decode 2.1", "row": "one rank, its best tile", "ranks": 1, "seconds": 20.0},
        {"case": "decode 2.1", "row": "all ranks", "ranks": 4, "seconds": 5.0},
        {"case": "decode 2.1", "row": "one rank, the same tile", "ranks": 1, "seconds": 10.0},
    ]
    alone = [{"case": "decode 2.1", "row": "all ranks", "ranks": 8, "seconds": 2.5}]
    more = [written(tmp_path / f"{i}.json", rows) for i, rows in enumerate((slower, decode, alone))]
    for order in ([*files, *more], [*more, *files]):
        measured = Measured.read(order)
        assert measured.forward["1.3b"] == 6.0 and measured.decode["2.1", 1] == 16.0
        assert measured.times_one["sequence", "1.3b", 4] == measured.times_one["guidance", "1.3b", 4] == 4.0
        assert measured.times_one["sequence", "1.3b", 2] == pytest.approx(6.0 / 3.4)
        assert measured.times_one["decode", "2.1", 4] == 4.0
    text = document(measured)
    assert "1.60 s, 4.00 m" in text and "5.0 s, 4.00 m" in text and "2.5 s m |" in text
    assert "4.00 times one GPU on 4" in text


def test_prompt_files_of_two_runs_keep_apart(files, tmp_path):
    runs = [{"gpus": 1, "clips_an_hour": 450.0}, {"gpus": 4, "clips_an_hour": 1350.0}]
    other = written(tmp_path / "other.json", [], runs=runs, options={"clips": 32, "frames": 5, "steps": 1})
    first, second = (_batch(*one) for one in Measured.read([*files, other]).batch)
    assert "16 clips of 5 frames, 2 steps" in first and "| 2 | 1700 m | 1.89 m |" in first and "1350" not in first
    assert "32 clips of 5 frames, 1 steps" in second and "| 4 | 1350 m | 3.00 m |" in second


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"seconds": 1.0}], "no 'case' in it"),
        ([{"seconds": 1.0, "case": "decode"}], "no result of"),
        ([{"seconds": 1.0, "case": "decode 3.0", "ranks": 1}], "'3.0'"),
        (["a row"], "no result of"),
        ([{"model": "1.3b", "case": "alone", "ranks": 1, "seconds": 0.1, "tokens": 120}], "120 tokens"),
        ([{"case": "decode 2.1", "ranks": 2, "seconds": 0.1, "pixels": [1, 5, 136, 240, 3]}], "136"),
    ],
)
def test_damaged_files_and_those_of_small_sizes_are_refused(rows, words, tmp_path, capsys):
    assert bench.main(["scaling", str(written(tmp_path / "rows.json", rows))]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and not printed.out


def test_two_kinds_of_cards_and_other_benchmarks_are_refused(files, tmp_path, capsys):
    row = {"model": "5b", "case": "alone", "ranks": 1, "seconds": 3.0}
    other = written(tmp_path / "other.json", [row], card="another card")
    assert bench.main(["scaling", *map(str, files), str(other)]) == 2
    assert "another card" in capsys.readouterr().err
    # A file from which nothing is taken may be of any card.
    Measured.read([*files, written(tmp_path / "profile.json", [{"way": "one rank"}], card="another card")])
    ours = written(tmp_path / "ours.json", [{"table": "attention", "seconds": 1.0}], t3_bench=1)
    assert bench.main(["scaling", str(ours)]) == 2
    tiny = written(tmp_path / "tiny.json", [], runs=[{"gpus": 1, "clips_an_hour": 9.0}], options={"tiny": True})
    assert bench.main(["scaling", str(tiny)]) == 2


@pytest.mark.parametrize("where", ["--into", "--plot"])
def test_a_place_that_cannot_be_written_is_refused_before_any_output(where, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "page.md").write_bytes(b"\xff\xfe no text")
    (tmp_path / "marks.md").write_text("no marks")
    (tmp_path / "file").touch()
    places = {"--into": ("page.md", "marks.md", "none.md"), "--plot": (".", "file/plot.png")}[where]
    for place in places:
        assert bench.main(["scaling", where, str(tmp_path / place)]) == 2
        printed = capsys.readouterr()
        assert place.rstrip(".") in printed.err and not printed.out
    assert bench.main(["scaling", "--price", "inf"]) == 2


def test_every_figure_of_the_document_says_what_it_is():
    """A number that is not a count of ranks, GPUs or clips, or of steps, has its letter."""
    tables, given = (
        document(NOTHING).split("**"),
        {"VAE", "ranks", "GPUs a clip", "clips asked for an hour", "model", "split", "from"},
    )
    checked = 0
    for table in tables:
        lines = [line[1:-1].split("|") for line in table.splitlines() if line.startswith("|")]
        for row in lines[2:]:
            for head, cell in zip(lines[0], row, strict=False):
                cell = cell.strip()
                if (
                    head.strip() in given
                    or not any(letter.isdigit() for letter in cell)
                    or row[0].strip() == "steps, with guidance"
                ):
                    continue
                if head.strip() == "" and cell == row[0].strip():
                    continue
                assert cell.split()[-1] in ("m", "c", "a"), (head, cell)
                checked += 1
    assert checked > 150


def test_more_gpus_make_a_clip_sooner_and_dearer():
    for model in models(NOTHING):
        found = [clip for _, clip, _ in clips(model, NOTHING)]
        assert [clip.gpus for clip in found][:4] == [1, 2, 4, 8]
        assert all(a.seconds > b.seconds and a.gpu_seconds < b.gpu_seconds for a, b in pairwise(found))
    # A link that is slow changes what is best for two.
    slow = models(NOTHING)[0]
    assert forward(slow, 2, 1e9) > slow.forward


def test_the_command_puts_the_tables_into_a_document(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["scaling", *map(str, files), "--price", "3", "--into", str(page)]
    assert bench.main([*arguments, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"before\n{BEGIN}\n\n{printed}\n\n{END}\nafter\n"
    assert "3.00 $ a" in printed
    assert bench.main(["scaling", "--price", "0"]) == 2
    assert bench.main(["scaling", "--into", str(files[0])]) == 2
    files[0].write_text("[]")
    assert bench.main(["scaling", str(files[0])]) == 2
    assert "no result of" in capsys.readouterr().err


def test_the_page_in_the_docs_is_what_the_command_prints():
    measured = sorted((ROOT / "benchmarks").glob("parallel_*.json"))
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    shown = page.partition(BEGIN)[2].partition(END)[0].strip()
    command = "python -m t3.bench scaling benchmarks/parallel_*.json --into docs/scaling.md --plot docs/scaling.png"
    assert shown == document(Measured.read(measured)), f"run: {command}"
