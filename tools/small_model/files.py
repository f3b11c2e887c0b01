"""What the stages share: a clock to stop by, cards, a folder of their own, a line to the screen."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from t3.errors import T3Error

TRAINED = Path(__file__).resolve().parent / "trained"  # what was published


class Stopwatch:
    """Seconds since it was made, and the limit to stop at."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._start = time.monotonic()

    def used(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._start


def visible_cards(workers: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES says for each of so many workers, in turn out of the cards this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in visible.split(",") if name] if visible else [str(i) for i in range(workers)]
    return [names[i % len(names)] if names else "" for i in range(workers)]


def fresh_folder(path: Path) -> Path:
    """Make a folder for results. Ends the program where there is one with something in it: nothing is overwritten."""
    if path.exists() and any(path.iterdir()):
        raise SystemExit(f"{path} holds something already. Name another folder, or remove it.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def forget_paths(folder: Path) -> None:
    """Take out of all configs in `folder` where diffusers loaded a model from: a path of one machine."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data. Raises `T3Error` where there is none, or it is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise T3Error(f"{path} cannot be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise T3Error(f"{path} is no TOML: {error}.") from None


def say(text: str) -> None:
    """One line to the screen, at once, also when the output is a file."""
    print(text, flush=True)
