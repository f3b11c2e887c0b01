"""`python -m t3.bench`: every subcommand at small sizes, what it writes, and what it refuses."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_fixtures import UNCOMPILED
from bench_fixtures import on_cpu as on_cpu
from PIL import Image
from vae_fixtures import one_thread as one_thread

from t3.bench import attention, comfyui
from t3.bench.__main__ import SUBCOMMANDS, main
from t3.bench.cases import TINY
from t3.bench.report import Report
from t3.bench.results_csv import COLUMNS, figures
from t3.errors import T3Error

ROOT = Path(__file__).resolve().parent.parent


RUNS = {
    "attention": ([], {"floor", "dense, sdpa", "as released, sdpa", "windows alone, sdpa", "T3, auto", "T3, sdpa"}),
    "peers": (
        ["--cases", "tiny odd"],
        {"floor", "dense, sdpa", "FlexAttention, strided windows", "T3, mean of its layers"},
    ),
    "kernels": ([], set()),
    "model": (
        ["--memory", "lean", "1", "--backends", "sdpa"],
        {"floor", "dense", "T3, auto", "T3, sdpa", "T3, lean", "T3, attention in 1 GiB"},
    ),
    "decode": (
        ["--vaes", "2.1", "--only", "ours", "diffusers, tiled"],
        {"truth", "ours, float32, tiles", "diffusers, tiled", "ours, all of the memory"},
    ),
    "growth": (["--sizes", "720p", "480p"], {"480p, T3", "480p, dense", "720p, T3", "1 frames", "21 frames"}),
}


@UNCOMPILED
@pytest.mark.parametrize("command", RUNS)
def test_every_subcommand_at_small_sizes(command, on_cpu, tmp_path, capsys):
    options, wanted = RUNS[command]
    out, lines, folder = tmp_path / "new" / "results.json", tmp_path / "all.csv", tmp_path / "plots"
    arguments = [command, "--tiny", *options, "--out", str(out), "--csv", str(lines), "--plots", str(folder)]
    assert main(arguments) == 0
    data = json.loads(out.read_text())
    assert [row for row in data["rows"] if "failed" in row] == []
    assert data["left_out"] == []
    measured = {row["variant"] for row in data["rows"] if "absent" not in row}
    assert wanted <= measured
    for row in data["rows"]:
        for metric, value in figures(row):
            assert not isinstance(value, float) or (value >= 0 and value < float("inf")), (row, metric)
        assert 0 <= row.get("error", 0) < 1e-5
    # One line a figure, with what it depends on.
    with lines.open(newline="") as file:
        found = list(csv.DictReader(file))
    expected = [(row["variant"], metric, str(value)) for row in data["rows"] for metric, value in figures(row)]
    assert [(line["variant"], line["metric"], line["value"]) for line in found] == expected
    assert all(line["machine"] == data["machine"]["machine"] and line["date"] for line in found)
    # What was measured, not where this machine keeps files.
    assert {line["command"] for line in found} == {
        shlex.join(["python", "-m", "t3.bench", command, "--tiny", *options])
    }
    # Every table stands under the machine line and names its rows.
    printed = capsys.readouterr().out
    cases = {(row["table"], row["case"]) for row in data["rows"]}
    closing = command == "growth"  # one table more, of all short clips
    assert printed.count(f"torch {torch.__version__}") == len(cases) + closing
    assert ("Where T3 stops paying" in printed) == closing
    assert all(f"| {variant}" in printed for variant in measured)
    pictures = sorted(folder.glob("*.png"))
    assert bool(pictures) == (command != "kernels")
    for picture in pictures:
        assert picture.name.startswith("results-")
        with Image.open(picture) as image:
            assert image.width > 300 and len(image.getcolors(1 << 24)) > 3


def test_a_killed_run_keeps_its_rows(tmp_path):
    out, lines = tmp_path / "results.json", tmp_path / "all.csv"
    command = [sys.executable, "-m", "t3.bench", "attention", "--tiny", "--out", str(out), "--csv", str(lines)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not out.exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    running.kill()
    running.wait()
    rows = json.loads(out.read_text())["rows"]
    assert rows
    assert lines.read_text().startswith(",".join(COLUMNS) + "\n")
    # A file that was being written when the end came has a hidden name.
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"all.csv", "results.json"}


def test_when_the_time_is_up_the_rest_is_named(on_cpu, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["attention", "--tiny", "--seconds", "1e-9", "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["rows"] == []
    assert [row["case"] for row in data["left_out"]] == [case.label for case in TINY]
    assert f"attention: {TINY[0].label}: all rows" in capsys.readouterr().out


def test_only_the_rows_that_were_asked_for(on_cpu, tmp_path):
    out = tmp_path / "results.json"
    assert main(["attention", "--tiny", "--cases", "tiny", "--only", "T3, sdpa", "--out", str(out)]) == 0
    variants = [row["variant"] for row in json.loads(out.read_text())["rows"]]
    assert "floor" in variants and "T3, sdpa" in variants
    assert all(variant == "floor" or "T3, sdpa" in variant for variant in variants)


def test_a_row_that_fails_says_why_and_stops_nothing(on_cpu, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such\nkernel image | here")

    monkeypatch.setattr(attention, "released", broken)
    out = tmp_path / "results.json"
    assert main(["attention", "--tiny", "--cases", "tiny", "--out", str(out)]) == 0
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["as released, sdpa"]["failed"] == "RuntimeError: no such kernel image | here"
    assert rows["T3, sdpa"]["ms"] > 0
    assert "| as released, sdpa | failed: RuntimeError: no such kernel image / here |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention", "--cases", "8K"], "'1.3B 4K'"),
        (["attention", "--seconds", "0"], "above 0"),
        (["attention", "--seconds", "nan"], "above 0"),
        (["growth", "--dense-seconds", "-1"], "above 0"),
        (["attention", "--cases", "1.3B 4K"], "add --tiny"),
        (["decode"], "add --tiny"),
        (["model", "--sizes", "5k"], "480p"),
        (["growth", "--sizes", "5k"], "480p"),
        (["model", "--backends", "fast"], "sdpa-cudnn"),
        (["model", "--memory", "-1"], "GiB above 0"),
        (["model", "--comfyui", "nowhere"], "main.py"),
        (["plot", "missing.json"], "missing.json"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, words, on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(Report, "__init__", lambda *_, **__: pytest.fail("work was begun"))
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_file_for_both_and_what_is_no_csv_are_refused(on_cpu, tmp_path, capsys):
    path = tmp_path / "results"
    assert main(["attention", "--tiny", "--out", str(path), "--csv", str(path)]) == 2
    assert "name two files" in capsys.readouterr().err and not path.exists()
    path.write_text("x" * 200_000)
    assert main(["attention", "--tiny", "--csv", str(path)]) == 2
    assert "cannot be written" in capsys.readouterr().err and path.read_text() == "x" * 200_000


def test_a_csv_whose_last_line_has_no_end_gets_one(on_cpu, tmp_path):
    lines = tmp_path / "all.csv"
    lines.write_text(",".join(COLUMNS))
    assert main(["attention", "--tiny", "--cases", "tiny", "--only", "T3, sdpa", "--csv", str(lines)]) == 0
    with lines.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(set(row) == set(COLUMNS) for row in rows)


def test_a_run_that_began_meanwhile_is_not_written_over(on_cpu, tmp_path):
    out = tmp_path / "results.json"
    first, second = (Report([], out=out, tiny=True) for _ in range(2))
    first.absent("t", "a", "first", "why")
    with pytest.raises(T3Error, match="kept as"):
        second.absent("t", "a", "second", "why")
    first.absent("t", "a", "more", "why")
    assert [row["variant"] for row in json.loads(out.read_text())["rows"]] == ["first", "more"]


def test_kernels_of_every_case_that_was_named(on_cpu, tmp_path):
    out = tmp_path / "results.json"
    assert main(["kernels", "--tiny", "--cases", "tiny odd", "tiny", "--out", str(out)]) == 0
    found = dict.fromkeys(row["case"] for row in json.loads(out.read_text())["rows"])
    assert list(found) == [TINY[1].label, TINY[0].label]


def test_files_in_the_way_are_refused_before_any_work(on_cpu, tmp_path, capsys):
    out, lines = tmp_path / "results.json", tmp_path / "all.csv"
    out.write_text("mine")
    lines.write_text("a,b\n1,2\n")
    assert main(["attention", "--tiny", "--out", str(out)]) == 2
    assert main(["attention", "--tiny", "--csv", str(lines)]) == 2
    assert (out.read_text(), lines.read_text()) == ("mine", "a,b\n1,2\n")
    assert "exists already" in (err := capsys.readouterr().err) and "has the columns" in err
    assert main(["attention", "--tiny", "--seconds", "1e-9", "--out", str(out), "--overwrite"]) == 0
    assert json.loads(out.read_text())["t3_bench"] == 1


def test_the_csv_grows_from_run_to_run(on_cpu, tmp_path):
    lines = tmp_path / "all.csv"
    arguments = ["attention", "--tiny", "--cases", "tiny", "--only", "T3, sdpa", "--csv", str(lines)]
    assert main(arguments) == 0
    first = lines.read_text()
    assert main(arguments) == 0
    assert lines.read_text().startswith(first) and len(lines.read_text()) > 1.5 * len(first)
    assert lines.read_text().count(",".join(COLUMNS)) == 1


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^ +{name}\b", printed, re.MULTILINE) for name in SUBCOMMANDS)


# The scripts in benchmarks/


@pytest.fixture
def keep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("keep")


def test_a_script_refuses_a_file_in_the_way_before_any_work(keep, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    out.write_text("mine")
    (tmp_path / "file").touch()
    for words, place in (("exists already", out), ("is a folder", tmp_path), ("cannot", tmp_path / "file" / "a.json")):
        monkeypatch.setattr(sys, "argv", ["script", "--out", str(place)])
        with pytest.raises(SystemExit) as end:
            keep.parse_with_out(argparse.ArgumentParser())
        assert end.value.code == 2 and words in capsys.readouterr().err
    assert out.read_text() == "mine"
    monkeypatch.setattr(sys, "argv", ["script", "--out", str(tmp_path / "new" / "a.json")])
    assert keep.parse_with_out(argparse.ArgumentParser()).out.parent.is_dir()
    monkeypatch.setattr(sys, "argv", ["script", "--out", str(out), "--overwrite"])
    assert keep.parse_with_out(argparse.ArgumentParser()).out == out


def test_what_a_script_kept_stays_whole_when_the_next_row_cannot_be_written(keep, tmp_path):
    out = tmp_path / "results.json"
    keep.save(None, {"rows": []})
    keep.save(out, {"rows": [1]})
    with pytest.raises(TypeError):
        keep.save(out, {"rows": [1, object()]})
    assert json.loads(out.read_text()) == {"rows": [1]} and list(tmp_path.iterdir()) == [out]


def test_a_script_s_run_and_its_second(tmp_path):
    out = tmp_path / "new" / "results.json"
    command = [sys.executable, "benchmarks/block_parts.py", "--tiny", "--only", "feed-forward", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for status in (0, 2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == status, done.stderr
    assert "exists already" in done.stderr and not done.stdout
    assert json.loads(out.read_text())["tiny, feed-forward"]["errors"]["ours"] < 0.01


# Plots and ComfyUI


def test_plots_from_a_file_on_another_machine(on_cpu, tmp_path, capsys):
    out, folder = tmp_path / "run.json", tmp_path / "plots"
    assert main(["attention", "--tiny", "--cases", "tiny", "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert main(["plot", str(out), "--plots", str(folder)]) == 0
    assert first.strip() in capsys.readouterr().out
    (picture,) = folder.glob("run-*.png")
    assert main(["plot", str(out), "--plots", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    picture.write_bytes(b"")
    assert main(["plot", str(out), "--plots", str(folder), "--overwrite"]) == 0
    assert picture.stat().st_size > 1000
    out.write_text("{}")
    assert main(["plot", str(out)]) == 2


@pytest.mark.parametrize(
    "damage", [{"rows": None}, {"rows": [{}]}, {"rows": ["a row"]}, {"machine": {}}, {"left_out": [1]}]
)
def test_no_file_is_plotted_where_one_is_damaged(damage, tmp_path, capsys):
    row = {"table": "t", "case": "a", "variant": "ours", "ms": 1.0}
    machine = {"machine": "a card", "torch": "2", "date": "2026-01-01"}
    sound = {"t3_bench": 1, "machine": machine, "ceilings": None, "command": "", "rows": [row], "left_out": []}
    files = [tmp_path / "one" / "run.json", tmp_path / "two" / "run.json", tmp_path / "damaged.json"]
    for file, data in zip(files, (sound, sound, sound | damage), strict=True):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(data))
    assert main(["plot", str(files[0]), str(files[2])]) == 2
    printed = capsys.readouterr()
    assert "damaged.json is damaged" in printed.err and not printed.out
    # Two of one name would draw over each other.
    assert main(["plot", *map(str, files[:2]), "--plots", str(tmp_path / "plots"), "--overwrite"]) == 2
    assert "same names" in capsys.readouterr().err and not (tmp_path / "plots").exists()


def test_without_matplotlib_plots_are_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Report, "__init__", lambda *_, **__: pytest.fail("work was begun"))
    assert main(["attention", "--plots", str(tmp_path)]) == 2
    assert "t3.bench plot FILE" in capsys.readouterr().err


SCRIPT = """
import argparse, json, sys, time
parser = argparse.ArgumentParser()
for name in ("--comfyui", "--out"):
    parser.add_argument(name)
for name in ("--models", "--only"):
    parser.add_argument(name, nargs="+")
parser.add_argument("--tiny", action="store_true")
options = parser.parse_args()
assert options.tiny and options.only == ["guidance"]
rows = {"guidance": {"step_s": 1.5, "batches": [2]}, "compiled": "failed: no compiler", "cancel_s": 0.2}
results = {"machine": {"comfyui": "0.30.0"}, "dynamic_vram": False, **dict.fromkeys(options.models, rows)}
with open(options.out, "w") as file:
    json.dump(results, file)
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A folder that passes for ComfyUI, and a script in place of the one that measures it."""
    (tmp_path / "main.py").touch()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(comfyui, "SCRIPT", script)
    return tmp_path


def test_comfyui_s_rows_come_from_a_process_of_their_own(on_cpu, host, tmp_path):
    out = tmp_path / "results.json"
    arguments = ["model", "--tiny", "--comfyui", str(host), "--models", "1.3b", "--only", "guidance", "--out", str(out)]
    before = set(sys.modules)
    assert main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {"ComfyUI 0.30.0, 1.3b"}
    found = {row["variant"]: row for row in rows}
    assert json.loads(out.read_text())["command"].endswith("--tiny --comfyui ... --models 1.3b --only guidance")
    assert found["guidance"]["step_s"] == 1.5 and found["guidance"]["batches"] == [2]
    assert not any(name.partition(".")[0] == "comfy" for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    ("options", "words"), [(["--sizes", "480p", "--compile"], "--sizes, --compile"), (["--models", "14b"], "not 14b")]
)
def test_what_comfyui_s_script_has_not_is_refused(host, options, words, monkeypatch, capsys):
    monkeypatch.setattr(Report, "__init__", lambda *_, **__: pytest.fail("work was begun"))
    assert main(["model", "--tiny", "--comfyui", str(host), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "seconds", "words"), [("sys.exit(3)", "60", "exit status 3"), ("time.sleep(60)", "4", "stopped")]
)
def test_a_script_that_ends_badly_is_a_row(on_cpu, host, tmp_path, ending, seconds, words):
    comfyui.SCRIPT.write_text(SCRIPT + ending)
    out = tmp_path / "results.json"
    arguments = [
        "model",
        "--tiny",
        "--comfyui",
        str(host),
        "--only",
        "guidance",
        "--out",
        str(out),
        "--seconds",
        seconds,
    ]
    begin = time.monotonic()
    assert main(arguments) == 0
    assert time.monotonic() - begin < 50
    rows = json.loads(out.read_text())["rows"]
    assert words in rows[-1]["failed"]
    assert rows[0]["step_s"] == 1.5  # what it wrote before is kept
