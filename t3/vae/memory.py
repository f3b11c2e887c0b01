"""How many bytes a decode takes, and how many there are.

Counted are the tensors this package makes: feature caches, frames that wait, and the largest step's inputs, copies and
results. What a library takes for itself inside a convolution is not known beforehand: `with_room` leaves some for it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .structure import Level, Structure
from .tiles import TileWindows, Window

# Frames a 3x3x3 convolution keeps from the past.
_PAST = 2
# Part of a device's free memory that a decode may take; the rest is for who else uses the device.
_SHARE = 0.95
# Bytes taken for every byte counted, on accelerators. The most that was measured beside cuDNN is 1.10.
_ROOM = 1.15


def middle_bytes(structure: Structure, height: int, width: int, itemsize: int) -> int:
    """Peak of the middle stage on `height` x `width` latents, without attention scores and without its results."""
    frame = height * width * itemsize
    caches = _PAST * (structure.latent_channels + 4 * structure.width)
    # In attention: the input and its norm, in float32 at first; q, k and v; their result and its copy.
    step = structure.width * (7 + 2 * (itemsize < 4))
    return frame * (caches + step)


def kept_bytes(structure: Structure, frames: int, height: int, width: int, itemsize: int) -> int:
    """The middle stage's results for `frames` latent frames."""
    return structure.width * frames * height * width * itemsize


def tile_bytes(structure: Structure, windows: TileWindows, core: Window, itemsize: int) -> int:
    """Peak of decoding one tile frame by frame. core: in latents; windows: `WanDecoder.windows(core)`."""
    caches, waiting, peak = 0, 0, 0
    for i, level in enumerate(structure.levels):
        after = windows[i + 1][0].area if i + 1 < len(windows) else 0
        entry = level.blocks[0].into * windows[i][0].area
        level_caches, step = _level(level, windows[i], after, itemsize)
        caches += level_caches
        peak = max(peak, waiting + entry + step)
        if level.upsample and level.upsample.temporal:
            waiting += level.upsample.out * after
    channels, area = structure.levels[-1].blocks[-1].out, windows[-1][-1].area
    caches += _PAST * channels * area
    picture = core.area * structure.upscale**2
    # The frame before the head and after its norm, side by side with the past; then pixels, also as floats.
    peak = max(peak, waiting + 5 * channels * area + 6 * 3 * structure.patch**2 * picture)
    return (caches + peak) * itemsize


def _level(level: Level, windows: tuple[Window, ...], after: int, itemsize: int) -> tuple[int, int]:
    """Elements of a level's caches, and of its largest step beyond them. after: area of the upsampled frames."""
    caches, step = 0, 0
    wide = 2 if itemsize < 4 else 0  # a norm's result in float32, before it is rounded to 16 bits
    for block, have, need in zip(level.blocks, windows, windows[1:], strict=False):
        into, middle = block.into * have.area, block.out * need.grown(block.radius).area
        out = block.out * need.area
        caches += _PAST * (into + middle)
        step = max(
            step,
            into + into + max(3 * into + middle, wide * into),
            into + middle + max(3 * middle + out, (1 + wide) * middle),
            into + 2 * out + (block.into * need.area if block.into != block.out else 0),
        )
    if level.upsample is not None:
        up, frame = level.upsample, level.upsample.into * windows[-1].area
        frames = 2 if up.temporal else 1
        caches += _PAST * frame * up.temporal
        in_time = frame + 3 * frame + 2 * frame if up.temporal else frame
        in_space = frame * (1 + 2 * up.temporal) + 4 * frame + frames * up.out * after
        step = max(step, in_time, in_space)
    return caches, step


def with_room(counted: int, device: torch.device) -> int:
    """Bytes to allow for so many that are counted, with what libraries take beside."""
    return counted if device.type == "cpu" else int(_ROOM * counted)


def free_needed(counted: int, device: torch.device) -> int:
    """Bytes that must be free on the device for a decode to plan with so many."""
    return math.ceil(with_room(counted, device) / _SHARE)


def free_bytes(device: torch.device) -> int:
    """Bytes a decode may take on this device now: nearly all that is free or that torch holds unused."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_SHARE * (free + unused))
    if device.type == "mps":
        return int(_SHARE * (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    # Other programs need main memory too, and the frames are written to it.
    return _available() // 2


def _available() -> int:
    """Main memory that can be had without swapping; within a container's limit where there is one."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            found.append(max(0, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min(found, default=4 << 30)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or the plain errors of its CPU, MPS and CUDA parts."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
