"""What all command lines share: how they end, and that results get through whatever takes them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from t3 import cli
from t3.parallel import faults

ROOT = Path(__file__).parents[1]


def needs(module: str):
    def command() -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    return command


@pytest.mark.parametrize(
    ("name", "extra"), [("t3.generate", "generate"), ("t3.retrofit", "train"), ("t3.bench", "bench")]
)
def test_a_missing_package_is_named_with_the_way_out(name, extra, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert cli.run(name, needs("diffusers.models"), as_json=True) == 2
    said = capsys.readouterr().err
    assert "the package diffusers is not installed" in said and f"pip install -e '.[{extra}]'" in said
    assert f"run.py {name.removeprefix('t3.')}" in said
    assert "Traceback" not in said


def test_a_missing_part_of_ours_is_a_fault_of_the_program(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(ModuleNotFoundError, match=r"t3\.nowhere"):
        cli.run("t3.generate", needs("t3.nowhere"), as_json=False)


def test_one_of_many_processes_says_it_as_plainly(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    world = SimpleNamespace(watch=None, is_first=True, rank=0)
    error = ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
    assert faults._end("t3.generate", world, error, as_json=True) == 2
    out, err = capsys.readouterr()
    assert "the package diffusers is not installed" in err and "Traceback" not in err
    assert json.loads(out)["status"] == 2


@pytest.mark.parametrize("fails", [None, "mypy"])
def test_what_failed_before_the_tests_is_said_after_them(monkeypatch, capfd, fails):
    """A wall of passed tests hides a failed check; the exit status is that of the worst."""
    called = []

    def fake(command, cwd):
        called.append(command[2])
        return SimpleNamespace(returncode=int(command[2] == fails))

    monkeypatch.setattr(run.subprocess, "run", fake)
    assert run.test("python", ["-k", "one or other"]) == int(fails is not None)
    assert called == ["ruff", "ruff", "mypy", "pytest"]
    assert ("mypy" in capfd.readouterr().err) is (fails is not None)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("way", ["inspect", "refusal", "many"])
def test_json_reaches_a_program_whatever_the_encoding_of_the_pipe(tmp_path, encoding, way):
    """Windows writes a pipe in the encoding of the place, which has no Chinese; half a character is in none."""
    name = "模型 \N{GRINNING FACE} ü.safetensors"
    code = {
        "inspect": f"from t3 import inspect; inspect.main([{name!a}, '--json'])",
        "refusal": f"from t3 import cli; cli.report('t3.generate', {name + chr(0xDC80)!a}, 2, True)",
        "many": f"from t3.parallel import faults; faults._print_end({name + chr(0xDC80)!a}, 2)",
    }[way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode(encoding)
    found = json.loads(done.stdout.decode(encoding))
    assert name in (found["file"] if way == "inspect" else found["error"])


def test_words_reach_a_file_whatever_its_encoding(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "t3.inspect", "模型.safetensors"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    said = done.stdout.decode("cp1252")
    assert done.returncode == 2 and r"\u6a21\u578b.safetensors does not exist" in said, done.stderr.decode("cp1252")
