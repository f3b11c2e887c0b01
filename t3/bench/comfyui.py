"""Rows of the real ComfyUI: a script outside this package does the work, since the engine never imports the host."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import T3Error
from .report import Report

TABLE = "ComfyUI"
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/comfyui_4k.py"


MODELS = ("1.3b", "5b")  # of the script's, those that this command knows too


def check_comfyui(folder: Path, models: list[str]) -> None:
    """Raise `T3Error` unless there are a ComfyUI in `folder`, the script that measures it, and its models."""
    for model in models:
        if model not in MODELS:
            raise T3Error(f"--comfyui measures {' and '.join(MODELS)}, not {model}.")
    if not (folder / "main.py").is_file():
        raise T3Error(f"--comfyui {folder}: no ComfyUI there (no main.py). Name the folder that holds it.")
    if not SCRIPT.is_file():
        raise T3Error(f"{SCRIPT} is missing: --comfyui needs the repository, not the package alone.")


def run_comfyui(report: Report, folder: Path, models: list[str], words: list[str]) -> None:
    """Run the script once, within the time that is left, and take over its rows. words: its `--only`."""
    case = "benchmarks/comfyui_4k.py"
    if report.over(TABLE, case, "all rows"):
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "comfyui.json"
        command = [sys.executable, str(SCRIPT), "--comfyui", str(folder), "--out", str(out), "--models", *models]
        command += ["--tiny"] if report.tiny else []
        command += ["--only", *words] if words else []
        problem = None
        try:
            # What it prints goes to standard error; standard output is for our tables.
            done = subprocess.run(command, stdout=2, timeout=report.left)
            problem = f"exit status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"stopped: --seconds {report.seconds:g} were over"
        results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    found = results.pop("machine", {})
    version = f"ComfyUI {found['comfyui']}, " if "comfyui" in found else ""
    for model, rows in results.items():
        if not isinstance(rows, dict):
            continue
        label = f"{version}{model}"
        for variant, figures in rows.items():
            if isinstance(figures, str) and figures.startswith("failed"):
                report.fail(TABLE, label, variant, figures.removeprefix("failed: "))
            else:
                report.take(TABLE, label, variant, figures if isinstance(figures, dict) else {"value": figures})
        report.show(TABLE, label)
    if problem:
        report.fail(TABLE, case, "the script", problem)
        report.show(TABLE, case)
