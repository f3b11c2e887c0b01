"""Where a script keeps its results: looked at before any work, and whole on disk after every row."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from t3.errors import T3Error
from t3.files import atomic_path, check_output


def parse_with_out(
    parser: argparse.ArgumentParser, *, required: bool = False, card: bool = False
) -> argparse.Namespace:
    """The arguments, with `--out` and `--overwrite` added. Ends in words where `--out` cannot be written or is taken.

    card: likewise where there is no CUDA card, or `--comfyui` names no ComfyUI.
    """
    parser.add_argument("--out", type=Path, metavar="FILE", required=required, help="JSON, written after each row")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    options = parser.parse_args()
    if options.out:
        try:
            options.out = check_output(options.out, options.overwrite)
        except T3Error as error:
            parser.error(f"--out: {error}")
    if card and not (options.comfyui / "main.py").is_file():
        parser.error(f"--comfyui: no ComfyUI in {options.comfyui}. tests/host/install.py puts one into .host/")
    if card and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA card here, and this script needs one")
    return options


def save(path: Path | None, results: Any) -> None:
    """Write all results so far, if they are to be kept. A run that ends here leaves the file that was there before."""
    if path:
        with atomic_path(path, overwrite=True) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
