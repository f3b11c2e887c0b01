"""Files of weights in ComfyUI's model folders, as nodes offer them: `loras/style.safetensors`."""

from __future__ import annotations

from pathlib import Path

from ..t3.errors import T3Error
from ..t3.weights.peft_settings import SETTINGS_FILE
from .verdict import verdict

SUFFIX = ".safetensors"  # the only one: other formats can run code when they are opened


def listed(*folders: str) -> list[str]:
    """Every safetensors file in these of ComfyUI's model folders, with the folder's name before it."""
    import folder_paths

    return [
        f"{folder}/{name}"
        for folder in folders
        for name in folder_paths.get_filename_list(folder)
        if name.lower().endswith(SUFFIX)
    ]


def find(entry: str, *folders: str) -> Path:
    """The file that `entry`, one of `listed(*folders)`, names.

    Raises `T3Error` for every other name: those that lead out of the folders, too.
    """
    import folder_paths

    folder, _, name = str(entry).partition("/")
    if folder in folders and name.lower().endswith(SUFFIX) and name in folder_paths.get_filename_list(folder):
        path = folder_paths.get_full_path(folder, name)
        if path is not None and Path(path).is_file():
            return Path(path)
    where = " and ".join(f"models/{name}" for name in folders)
    raise T3Error(
        f"{entry!r} is no {SUFFIX} file in {where}; choose one of the list. A file put there just now appears when you "
        "press R."
    )


def verdict_on(entry: str | None, *folders: str) -> bool | str:
    """For `validate_inputs`: why `find` would refuse `entry`. True where it would not, or it comes over a link."""
    return entry is None or verdict(find, entry, *folders)


def state(entry: str | None, *folders: str) -> str:
    """For `fingerprint_inputs`: changes when the file, or PEFT's settings beside it, do.

    What comes over a link is not known yet when the host asks: then it changes when any file of these folders does.
    """
    import folder_paths

    if entry is not None:
        return _state(find(entry, *folders))
    parts = (listed_file.partition("/") for listed_file in listed(*folders))
    paths = (folder_paths.get_full_path(folder, name) for folder, _, name in parts)
    return " ".join(_state(Path(path)) for path in paths if path is not None)


def _state(path: Path) -> str:
    found = [path, path.with_name(SETTINGS_FILE)]
    return " ".join(f"{p} {p.stat().st_mtime_ns} {p.stat().st_size}" for p in found if p.is_file())
