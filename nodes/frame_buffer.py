"""Room for decoded frames: in main memory, or in a file where that is short."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence

import comfy.model_management
import folder_paths
import psutil
import torch

from ..t3.errors import T3Error
from ..t3.files import reason

# Frames may take this part of the main memory that is free: the decoder, the encoder and other programs need some.
_SHARE = 0.5


def new_frames(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU, backed by a file in ComfyUI's temporary folder where main memory is short.

    The file has no name, or loses it with the tensor: it is gone when the tensor and its views are, also after a crash.

    Raises T3Error if neither memory nor that disk has the room.
    """
    size = math.prod(shape) * dtype.itemsize
    free = free_main_memory()
    if size <= _SHARE * free:
        return torch.empty(tuple(shape), dtype=dtype)
    return _mapped(size, free).view(dtype).view(*shape)


def new_images(shape: Sequence[int], dtype: torch.dtype, device: torch.device, way_out: str) -> torch.Tensor:
    """An uninitialised tensor for ComfyUI's IMAGE, which is always in memory.

    Raises T3Error, which ends in `way_out`, if it does not fit: better than a system that stops the whole program in
    the middle of a decode.
    """
    size = math.prod(shape) * dtype.itemsize
    free = comfy.model_management.get_free_memory(device)
    if device.type == "cpu":
        free = free_main_memory() + psutil.swap_memory().free
    try:
        if size <= free:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
    except (RuntimeError, MemoryError):
        pass
    raise T3Error(
        f"{shape[0]} frames of {shape[2]} x {shape[1]} pixels as IMAGE take {size / 1e9:,.1f} GB of memory, and "
        f"{free / 1e9:,.1f} GB are free. {way_out}"
    )


def free_main_memory() -> int:
    """Bytes of main memory that are free, as ComfyUI counts them."""
    return int(comfy.model_management.get_free_memory(torch.device("cpu")))


def _mapped(size: int, free: int) -> torch.Tensor:
    """`size` bytes of a new temporary file, as a uint8 tensor that owns it."""
    folder = folder_paths.get_temp_directory()
    try:
        os.makedirs(folder, exist_ok=True)
        if size > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, "the disk is too full")
        with tempfile.TemporaryFile(dir=folder) as file:
            _take_room(file.fileno(), size)
            # The mapping keeps the file open and the tensor keeps the mapping.
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    except (OSError, ValueError) as error:
        raise T3Error(
            f"the decoded frames take {size / 1e9:,.1f} GB; {free / 1e9:,.1f} GB of memory are free, and a file in "
            f"{folder} could not be made ({reason(error)}). Free memory or disk space, "
            "choose bit_depth 8, or decode fewer frames."
        ) from error


def _take_room(file: int, size: int) -> None:
    """Make an open, empty file this large, with the room on the disk taken where the system can do that.

    Writing to a mapped page that the disk has no room for kills the process.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(file, size)
