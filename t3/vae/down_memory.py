"""How many bytes an encode takes: the counterpart of `t3.vae.memory`, by the same rules.

Counted are the tensors this package makes: feature caches, frames that wait, and the largest step's inputs, copies and
results.
"""

from __future__ import annotations

from .down_structure import DownLevel, DownStructure
from .down_tiles import DownWindows
from .tiles import Window

# Frames a 3x3x3 convolution keeps from the past.
_PAST = 2


def down_middle_bytes(structure: DownStructure, height: int, width: int, itemsize: int) -> int:
    """Peak of the middle stage on `height` x `width` latents, without attention scores and without its input."""
    caches = _PAST * 5 * structure.width
    # A convolution's frame and its norm, three frames side by side and the result; or in attention the input, q, k and
    # v, their result, its copy and its projection. A norm is made in float32 at first.
    step = structure.width * (7 + 2 * (itemsize < 4))
    return height * width * itemsize * (caches + step + 2 * structure.latent_channels)


def features_bytes(structure: DownStructure, latent_frames: int, height: int, width: int, itemsize: int) -> int:
    """What the middle stage is given for a clip of `latent_frames` latent frames."""
    return structure.width * latent_frames * height * width * itemsize


def down_tile_bytes(structure: DownStructure, windows: DownWindows, itemsize: int) -> int:
    """Peak of taking one tile, frame by frame, down to the middle stage. windows: `WanEncoder.windows(core)`."""
    picture = structure.picture_channels * windows.pixels.area
    caches = _PAST * picture
    first = structure.levels[0].blocks[0].into * windows.levels[0][0].area
    step = 5 * picture + first
    for i, level in enumerate(structure.levels):
        have = windows.levels[i]
        need = windows.levels[i + 1][0] if i + 1 < len(windows.levels) else have[-1]
        level_caches, level_step = _level(level, have, need, structure.residual, itemsize)
        caches += level_caches
        step = max(step, picture + level_step)
    # A frame as it came and as floats, in the encoder's dtype, and with its pixels in the channels.
    taken = picture * (2 * max(4, itemsize) + 2 * itemsize)
    return caches * itemsize + max(step * itemsize, taken)


def _level(
    level: DownLevel, windows: tuple[Window, ...], need: Window, residual: bool, itemsize: int
) -> tuple[int, int]:
    """Elements of a level's caches, and of its largest step beyond them, its input included."""
    caches, step = 0, 0
    wide = 2 if itemsize < 4 else 0  # a norm's result in float32, before it is rounded to 16 bits
    entry = level.blocks[0].into * windows[0].area
    for i, (block, have, then) in enumerate(zip(level.blocks, windows, windows[1:], strict=False)):
        into, middle = block.into * have.area, block.out * then.grown(block.radius).area
        out = block.out * then.area
        caches += _PAST * (into + middle)
        # The level's input stays until the level is done; the first block's input is the same tensor.
        step = max(
            step,
            (entry if i else 0) + into + into + max(3 * into + middle, wide * into),
            (entry if i else 0) + into + middle + max(3 * middle + out, (1 + wide) * middle),
            (entry if i else 0) + into + 2 * out + (block.into * then.area if block.into != block.out else 0),
        )
    result = level.blocks[-1].out * need.area
    if level.downsample is not None:
        full, half = level.downsample.channels * windows[-1].area, level.downsample.channels * need.area
        # The last block's result with zeros at the edge; in time, a frame kept, one that waits, three side by side.
        caches += 2 * half * level.downsample.temporal
        step = max(step, entry + 2 * full + half, entry + full + 5 * half * level.downsample.temporal)
    if residual:
        temporal = level.downsample is not None and level.downsample.temporal
        dealt = level.blocks[0].into * need.area * (4 if level.downsample else 1)
        caches += dealt * temporal
        step = max(step, entry + result + dealt * (3 if temporal else 1) + 2 * result)
    return caches, step
