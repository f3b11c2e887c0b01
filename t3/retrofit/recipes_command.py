"""`python -m t3.retrofit recipes`: the shipped configs, to list and to copy."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ..cli import run
from ..errors import T3Error
from ..files import atomic_path, check_output


def main(arguments: Sequence[str]) -> int:
    """Parse, run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="t3.retrofit recipes", description="List the shipped configs, or copy one.")
    parser.add_argument("--write", nargs=2, metavar=("NAME", "FILE"), help="copy a recipe to a file of yours")
    args = parser.parse_args(arguments)
    return run("t3.retrofit recipes", lambda: _write(*args.write) if args.write else _list(), as_json=False)


def recipes() -> dict[str, str]:
    """Name -> TOML text of every shipped recipe."""
    folder = resources.files(__package__) / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file.read_text(encoding="utf-8") for file in files}


def summary(text: str) -> str:
    """A recipe's first line, which says what it is for."""
    return text.splitlines()[0].lstrip("# ")


def _list() -> int:
    for name, text in recipes().items():
        print(f"{name:28} {summary(text)}")
    return 0


def _write(name: str, file: str) -> int:
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise T3Error(
            f"there is no recipe {name!r}; known are {', '.join(known)}." + (f" Nearest: {near[0]}." if near else "")
        )
    final = check_output(Path(file))
    with atomic_path(final) as temp:
        temp.write_text(known[name], encoding="utf-8")
    print(final)
    return 0
