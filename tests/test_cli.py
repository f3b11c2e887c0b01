"""How every command line ends where a package is missing: in a sentence that says what to install."""

import json
import signal
from types import SimpleNamespace

import pytest

import run
from t3 import cli
from t3.parallel import faults


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
