"""Exact decode of Wan video latents in tiles: no seams, and no more memory than is allowed."""

from .decode import decode_frames
from .decoder import WanDecoder

__all__ = ["WanDecoder", "decode_frames"]
