"""The model that needs no download: a small Wan, trained from nothing, in `model/` beside this file."""

from __future__ import annotations

from pathlib import Path

from .errors import T3Error

NOTICE = (
    "No model was named: this is the embedded one, trained from nothing on drawings of coloured shapes. It knows "
    'captions like "two small blue circles moving up on a white background" and follows them roughly. Name a real '
    "model with --model or --dit."
)


def embedded_folder() -> Path:
    """The embedded model, a folder in diffusers' layout, which is only ever read. Raises `T3Error` if it is missing."""
    folder = Path(__file__).resolve().parent / "model"
    if not (folder / "model_index.json").exists():
        raise T3Error(
            f"no model was named, and the embedded one is missing from {folder.parent}: install T3 again, or name a "
            "model with --model or --dit."
        )
    return folder
