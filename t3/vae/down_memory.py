"""How many bytes an encode takes: the counterpart of `t3.vae.memory`, by the same rules.

Counted are the tensors this package makes: feature caches, frames that wait, and the largest step's inputs, copies and
results.
"""

from __future__ import annotations

from .down_structure import DownLevel, DownStructure
from .down_tiles import DownWindows
from .memory import DEPTH, level_needs, middle_step
from .tiles import Window, convolved


def down_middle_bytes(structure: DownStructure, height: int, width: int, itemsize: int) -> int:
    """Peak of the middle stage on `height` x `width` latents, without attention scores and without its input."""
    caches = DEPTH * 5 * structure.width
    return height * width * itemsize * (caches + middle_step(structure.width) + 2 * structure.latent_channels)


def features_bytes(structure: DownStructure, latent_frames: int, height: int, width: int, itemsize: int) -> int:
    """What the middle stage is given for a clip of `latent_frames` latent frames."""
    return structure.width * latent_frames * height * width * itemsize


def down_tile_bytes(structure: DownStructure, windows: DownWindows, itemsize: int) -> int:
    """Peak of taking one tile, frame by frame, down to the middle stage. windows: `WanEncoder.windows(core)`."""
    picture = structure.picture_channels * windows.pixels.area
    caches = DEPTH * picture
    entry = structure.levels[0].blocks[0].into * convolved(windows.pixels, structure.first_radius)
    step = 2 * picture + entry
    for i, level in enumerate(structure.levels):
        have = windows.levels[i]
        need = windows.levels[i + 1][0] if i + 1 < len(windows.levels) else have[-1]
        level_caches, level_step, entry = _level(level, have, need, entry, structure.residual)
        caches += level_caches
        step = max(step, level_step)
    # A frame as it came and as floats, in the encoder's dtype, and with its pixels in the channels.
    taken = picture * (2 * max(4, itemsize) + 2 * itemsize)
    return caches * itemsize + max((picture + step) * itemsize, taken)


def _level(
    level: DownLevel, windows: tuple[Window, ...], need: Window, entry: int, residual: bool
) -> tuple[int, int, int]:
    """Numbers of a level's caches, of its largest step beyond them, its input included, and of its result's terms.

    entry: numbers of its input's terms.
    """
    blocks = level_needs(level.blocks, windows, entry, residual)
    caches, step, result = blocks.caches, blocks.step, blocks.result
    if level.downsample is not None:
        channels = level.downsample.channels
        full, half, seen = channels * windows[-1].area, channels * need.area, 4 * channels * need.area
        # The last block's result, added up; with zeros at the edge; and in time, a frame kept, one that waits, and
        # three side by side.
        caches += 2 * half * level.downsample.temporal
        step = max(step, blocks.kept + result + full, blocks.kept + full + seen + half)
        step = max(step, blocks.kept + full + 5 * half * level.downsample.temporal)
        result = 2 * half
    if residual:
        temporal = level.downsample is not None and level.downsample.temporal
        dealt = level.blocks[0].into * need.area * (4 if level.downsample else 1)
        out = level.blocks[-1].out * need.area
        caches += dealt * temporal
        step = max(step, blocks.kept + result + dealt * (3 if temporal else 1) + 2 * out)
        result = 2 * out
    return caches, step, result
