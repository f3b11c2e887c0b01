"""A data set's folder beside its shards: the index, latents of grey clips, and who may write to it."""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..claims import Claim, holder_at, take_folder
from ..errors import T3Error
from ..files import atomic_path, json_text, reason

if TYPE_CHECKING:
    import torch

INDEX = "index.json"
GREY = "grey.safetensors"
VERSION = 1


class WriterLock:
    """What one writer of a folder has and no other, until it is released, forgotten, or its process is gone.

    It is a claim on the index (see `t3.claims`). Two writers would give their shards the same names, and the index of
    one would list the clips of the other.
    """

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be. Raises `T3Error` where another writer has it, or no file can be put."""
        self.folder = folder
        claim = take_folder(
            folder / INDEX,
            "is open for writing by",
            "and two writers would mix up their clips. Wait until it is closed, or name another folder.",
        )
        self._claim = claim.__enter__()
        # Also when nobody closes the writer: it may be opened without a `with` block.
        self.release = weakref.finalize(self, _release, claim)

    def check(self) -> None:
        """Raise `T3Error` unless this writer still has the folder."""
        if not self.release.alive:
            raise T3Error(f"the writer of {self.folder} is closed. Open another ShardWriter to go on.")
        other = holder_at(self._claim.path)
        if other is not None and other != self._claim.holder:
            raise T3Error(
                f"{self.folder} was taken over by {other}, since this process gave no sign of life. What it has not "
                "written is lost; run it again when the other has ended."
            )


def _release(claim: Claim) -> None:
    # A forked process ends with a copy of what its parent still has.
    if claim.holder.pid == os.getpid():
        claim.__exit__()


@contextlib.contextmanager
def told(file: Path) -> Iterator[None]:
    """Raise `T3Error` where the disk does not take a file of a data set."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise T3Error(
            f"{file} could not be written ({reason(error)}). Free space on that disk and run the same command again: "
            "it goes on where this one stopped."
        ) from error


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Put a data set's index in place of the one before."""
    with told(folder / INDEX), atomic_path(folder / INDEX, overwrite=True) as temp:
        temp.write_text(json_text(index, indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any]:
    """A data set's index. Raises `T3Error` where there is none, or it is damaged or of another version."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise T3Error(
            f"{folder} is no encoded data set ({error.strerror}: {INDEX}). Make one with "
            "`python -m t3.retrofit encode`."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise T3Error(f"{file} is damaged ({error}). Encode the data set again into an empty folder.") from None
    if not isinstance(index, dict) or index.get("t3_dataset") != VERSION:
        found = index.get("t3_dataset") if isinstance(index, dict) else None
        raise T3Error(f"{file} is a data set of version {found!r}; this release reads version {VERSION}.")
    return index


def size_name(shape: Sequence[int]) -> str:
    """What latents of a grey clip of this shape are called among the others."""
    return "x".join(map(str, shape))


def read_greys(folder: Path) -> dict[str, torch.Tensor]:
    """Latents `[C, T, H, W]` in 16 bits of the grey clips that a data set has, by `size_name`."""
    from safetensors.torch import load_file

    file = folder / GREY
    return load_file(file) if file.exists() else {}


def write_greys(folder: Path, latents: Mapping[str, torch.Tensor]) -> None:
    """Put latents of grey clips, as `read_greys` gives them, in place of those before."""
    from safetensors.torch import save_file

    with told(folder / GREY), atomic_path(folder / GREY, overwrite=True) as temp:
        save_file(dict(latents), temp)
