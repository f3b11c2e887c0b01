"""Exact decode and encode of Wan video latents in tiles: no seams, and no more memory than is allowed.

`t3.vae.shared_decode` and `t3.vae.shared_encode` do the same over several processes.
"""

from .decode import decode_frames
from .decoder import WanDecoder
from .encode import encode_frames
from .encoder import WanEncoder

__all__ = ["WanDecoder", "WanEncoder", "decode_frames", "encode_frames"]
