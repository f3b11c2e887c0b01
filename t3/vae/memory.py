"""How many bytes a decode takes, and how many there are.

Counted are the tensors this package makes: feature caches, frames that wait, and the largest step's inputs and results.
What a library takes for itself inside a convolution is not known beforehand: `with_room` leaves some for it.
"""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from .structure import Block, Level, Structure
from .tiles import TileWindows, Window, convolved

# Frames that a causal convolution looks at, and has a place for.
DEPTH = 3
# Part of a device's free memory that a decode may take; the rest is for who else uses the device.
_SHARE = 0.95
# Bytes taken for every 100 counted, on accelerators. The most that was measured beside cuDNN is 110.
_ROOM = 115
# A container's limit, what is used of it, and by what: files that were read stay until somebody needs the room.
_CGROUP = Path("/sys/fs/cgroup")
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file", "slab_reclaimable")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


def middle_bytes(structure: Structure, height: int, width: int, itemsize: int) -> int:
    """Peak of the middle stage on `height` x `width` latents, without attention scores and without its results."""
    caches = DEPTH * (structure.latent_channels + 4 * structure.width)
    return height * width * itemsize * (caches + middle_step(structure.width))


def middle_step(width: int) -> int:
    """Numbers per latent of the middle stage's largest step: in attention, its input, the norm of it, q, k and v."""
    return 5 * width


def kept_bytes(structure: Structure, frames: int, height: int, width: int, itemsize: int) -> int:
    """The middle stage's results for `frames` latent frames."""
    return structure.width * frames * height * width * itemsize


def tile_bytes(structure: Structure, windows: TileWindows, core: Window, itemsize: int) -> int:
    """Peak of decoding one tile frame by frame. core: in latents; windows: `WanDecoder.windows(core)`."""
    caches, waiting, peak = 0, 0, 0
    entry = structure.levels[0].blocks[0].into * windows[0][0].area
    for level, have in zip(structure.levels, windows, strict=True):
        needs = level_needs(level.blocks, have, entry, structure.residual and level.upsample is not None)
        caches += needs.caches
        peak = max(peak, waiting + needs.step)
        if level.upsample is None:
            entry = needs.result
            continue
        up = _upsampling(level, have, needs)
        caches += up.caches
        peak = max(peak, waiting + up.step)
        entry = up.result
        if level.upsample.temporal:
            # Of two frames, one waits while the other goes on.
            waiting += entry + needs.kept
        else:
            entry += needs.kept
    last = windows[-1][-1]
    channels, colours = structure.levels[-1].blocks[-1].out, 3 * structure.patch**2
    caches += DEPTH * channels * last.area
    pixels = core.area * structure.upscale**2
    # The head's result, the frame with its pixels in place, as floats, and two that are on their way out.
    head = colours * (convolved(last, structure.head_radius) + 9 * pixels)
    peak = max(peak, waiting + entry, waiting + head)
    return (caches + peak) * itemsize


class Needs(NamedTuple):
    """Of a part of a level, in numbers. caches: kept from frame to frame. step: the most beyond them, with the input.
    result: of the sum that it gives, not yet added up. kept: of its input, if that is wanted to the end."""

    caches: int
    step: int
    result: int
    kept: int


def level_needs(blocks: tuple[Block, ...], windows: tuple[Window, ...], entry: int, keep: bool) -> Needs:
    """Of a level's residual blocks. entry: numbers of its input's terms; keep: whether the input is wanted after."""
    caches, step, kept = 0, 0, 0
    for block, (have, need) in zip(blocks, pairwise(windows), strict=True):
        middle = need.grown(block.radius)
        x = block.into * have.area
        caches += DEPTH * (x + block.out * middle.area)
        first, second = block.out * convolved(have, block.radius), block.out * convolved(middle, block.radius)
        around = block.out * have.area if block.into != block.out else 0
        # Two copies of a weight: as it is, and turned. The first belongs to the decoder.
        weight = 9 * DEPTH * block.out * max(block.into, block.out)
        step = max(step, kept + entry + x, kept + x + first + weight, kept + x + second + max(weight, around))
        entry = second + (around or x)
        kept = kept or (x if keep else 0)
    return Needs(caches, step, entry, kept)


def _upsampling(level: Level, windows: tuple[Window, ...], blocks: Needs) -> Needs:
    """Of a level's upsampling, after its blocks. `result` is of one frame."""
    up, last = level.upsample, windows[-1]
    assert up is not None
    frame, doubled = up.into * last.area, 4 * up.out * (last.rows.length + 1) * (last.cols.length + 1)
    if up.temporal:
        steps = [blocks.result, 2 * frame + doubled, frame + 2 * doubled]
    else:
        steps = [blocks.result + frame, frame + doubled]
    return Needs(DEPTH * frame * up.temporal, blocks.kept + max(steps), doubled, blocks.kept)


def with_room(counted: int, device: torch.device) -> int:
    """Bytes to allow for so many that are counted, with what libraries take beside."""
    return counted if device.type == "cpu" else -(-_ROOM * counted // 100)


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


def free_for_each(device: torch.device, ranks: int) -> int:
    """Bytes for each of so many processes: a card each, or a share of the main memory."""
    return free_bytes(device) // (ranks if device.type == "cpu" else 1)


def _available() -> int:
    """Main memory that can be had without swapping; within a container's limit where there is one."""
    import psutil

    available = psutil.virtual_memory().available
    for limit, used, details, cached in _CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # no container of this kind, or the word "max" for no limit
            room = int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())
            found = dict(line.split() for line in (_CGROUP / details).read_text().splitlines())
            available = min(available, max(0, room + sum(int(found.get(name, 0)) for name in cached)))
    return available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, or the plain errors of its CPU, MPS and CUDA parts."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(word in text for word in words)
