"""Command lines set up torch's allocator before torch is imported; what the user has set, and libraries, stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME, WANTED = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
OTHERS = ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Prints what the variable is when torch is first looked for, which ends the process.
WATCHED = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
            os._exit(7)

import t3.cli
sys.meta_path.insert(0, Watch())
"""


def python(code, *arguments, **variables):
    known = {key: value for key, value in os.environ.items() if key not in (NAME, *OTHERS)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env={**known, **variables}, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


linux = pytest.mark.skipif(sys.platform != "linux", reason="torch cannot do it here")


@linux
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("t3.generate", ["--out", "{folder}/clip.mp4", "--model", HUB, "--prompt", "a kite"]),
        ("t3.decode", ["{folder}/no.latent", "--vae", "{folder}", "--out", "{folder}/clip.mp4"]),
        ("t3.retrofit.command", ["t3/retrofit/recipes/from-nothing.toml", "--dry-run"]),
    ],
)
def test_a_command_has_it_when_torch_is_imported(tmp_path, module, arguments):
    (tmp_path / "no.latent").write_bytes(b"")
    code = f"{WATCHED}\nfrom {module} import main\nmain(sys.argv[1:])"
    status, out, err = python(code, *(a.format(folder=tmp_path) for a in arguments))
    assert (status, out) == (7, WANTED), err


SET = "import os, sys; from t3 import cli; {before}; cli.let_segments_grow(); print(os.environ.get({name!r}))"


def outcome(before="pass", name=NAME, **variables):
    status, out, err = python(SET.format(before=before, name=name), **variables)
    assert status == 0 and not err, err
    return out


@linux
def test_it_is_set_in_silence():
    assert outcome() == WANTED


@pytest.mark.parametrize("name", [NAME, *OTHERS])
@pytest.mark.parametrize("value", ["max_split_size_mb:512", "expandable_segments:False", ""])
def test_the_user_s_own_choice_stays(name, value):
    assert outcome(name=name, **{name: value}) == value
    if name != NAME:
        assert outcome(**{name: value}) == "None"


@pytest.mark.parametrize(
    "before",
    [
        "import torch",
        "sys.platform = 'win32'",
        "sys.platform = 'darwin'",
        "cli.version = lambda name: '2.9.0+rocm6.4'",
    ],
)
def test_where_it_would_do_nothing_or_warn_it_is_left_out(before):
    assert outcome(before) == "None"


def test_importing_the_package_sets_nothing():
    code = f"import os, t3, t3.generate, t3.decode, t3.retrofit.command; print(os.environ.get({NAME!r}))"
    assert python(code)[:2] == (0, "None")
