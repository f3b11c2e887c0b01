#!/usr/bin/env python3
"""Set up what is needed, once, and run: `python3 run.py generate`, `python3 run.py test`.

Everything is installed into `.venv` beside this file. Only Python's standard library is used here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
USAGE = """usage: python3 run.py COMMAND [ARGUMENTS]

  generate   text to video; without arguments the embedded model draws a clip (python -m t3.generate)
  decode     saved latents to video (python -m t3.decode)
  inspect    what a file of weights is, and which of its keys have no place (python -m t3.inspect)
  convert    weights under the names of another program, or merged into a model (python -m t3.convert)
  extract    a tuned model as a LoRA for the model it was tuned from (python -m t3.extract)
  retrofit   tune a model to T3, or train one (python -m t3.retrofit)
  backends   which attention kernels this machine can use (python -m t3.backends)
  bench      how fast this machine is at it, beside other implementations (python -m t3.bench)
  test       lint, types and all tests; ARGUMENTS go to pytest
"""
SHARED = ["-n", "auto", "--dist", "worksteal"]
HOST = "tests/host/install.py"  # brings the ComfyUI that the tests run against
EXTRAS = {
    **dict.fromkeys(("generate", "decode", "inspect", "convert", "extract", "backends"), "generate"),
    "bench": "bench",
    "retrofit": "train",
    "test": "test",
}


def environment(extra: str) -> Path:
    """The Python of an environment with this extra installed; made or brought up to date if need be."""
    folder = Path(os.environ.get("T3_VENV") or ROOT / ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    files = ["pyproject.toml", "constraints.txt", *([HOST] if extra == "test" else [])]
    wanted = b"".join((ROOT / name).read_bytes() for name in files)
    stamp = folder / f"installed-{extra}"
    state = hashlib.sha256(wanted + str(ROOT).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == state:
        return python
    if not python.exists():
        print(f"Making an environment in {folder} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
    print("Installing (a few minutes the first time; torch is large) ...", file=sys.stderr, flush=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    package = [*install, *which_torch(python), "-e", f"{ROOT}[{extra}]"]
    if extra == "test":
        # What needs no package comes meanwhile; where that fails, the second call says why.
        with subprocess.Popen([python, ROOT / HOST, "--downloads"]):
            subprocess.run(package, check=True)
        subprocess.run([python, ROOT / HOST], check=True)
    else:
        subprocess.run(package, check=True)
    stamp.write_text(state)
    return python


def which_torch(python: Path) -> list[str]:
    """pip arguments that keep the torch this environment has, whatever build that is; without one, the tested one."""
    ask = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return [f"torch=={found.stdout.strip()}"] if found.returncode == 0 else ["-c", str(ROOT / "constraints.txt")]


def test(python: Path, arguments: list[str]) -> int:
    """Lint and types first, since they are quick; pytest always runs, and speaks last where those passed. All tests are
    shared by two processes (tests/conftest.py); one that runs out of tests takes over some of the other's."""
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    codes = [subprocess.run([python, "-m", *check], cwd=ROOT).returncode for check in checks]
    failed = [" ".join(check) for check, code in zip(checks, codes, strict=True) if code]
    codes.append(subprocess.run([python, "-m", "pytest", *(arguments or SHARED)], cwd=ROOT).returncode)
    if failed:
        print(f"Failed as well, before the tests (see above them): {', '.join(failed)}", file=sys.stderr)
    return max(codes)


def hand_over(command: list[str]) -> int:
    """Run a command in place of this process, so that Ctrl-C and a request to end reach it, and nothing cuts short
    what it has to put away."""
    if os.name != "nt":
        sys.stdout.flush()
        os.execv(command[0], command)
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # the command has it too, and ends in its own time


def main() -> int:
    if sys.version_info < (3, 10):
        print(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 2
    command, *arguments = sys.argv[1:] or ["--help"]
    if command not in EXTRAS:
        print(USAGE, end="")
        return 0 if command in ("-h", "--help") else 2
    try:
        python = environment(EXTRAS[command])
    except subprocess.CalledProcessError as error:
        print(f"The installation failed (exit status {error.returncode}); pip's message is above.", file=sys.stderr)
        return 1
    if command == "test":
        return test(python, arguments)
    return hand_over([str(python), "-m", f"t3.{command}", *arguments])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
