"""Latents to frames with a loaded Wan VAE: in exact tiles that fit the memory (`t3.vae`), with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLWan

from .errors import T3Error
from .vae import WanDecoder
from .vae import decode_frames as decode_in_tiles

if TYPE_CHECKING:
    from .vae.ranks import Ranks

Say = Callable[[str], None]

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def frame_count(latent_frames: int) -> int:
    """Frames of a clip of so many latent frames: the first stands for one, every other for four."""
    return 4 * (latent_frames - 1) + 1


def check_latents(latents: torch.Tensor, vae: AutoencoderKLWan) -> None:
    """Raise `T3Error` unless `[B, C, T, H, W]` latents have the channels that this VAE decodes."""
    channels = vae.config.z_dim
    if latents.shape[1] != channels:
        raise T3Error(
            f"these latents have {latents.shape[1]} channels and this VAE decodes {channels}. Latents of Wan2.1 and "
            "A14B (16) go with the Wan2.1 VAE, those of Wan2.2 5B (48) with the Wan2.2 VAE."
        )


def decode_frames(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    device: torch.device,
    say: Say,
    bit_depth: int,
    ranks: Ranks | None = None,
    report: dict | None = None,
) -> Iterator:
    """Decode `[1, C, T, H, W]` latents in the VAE's space. Yields frames `[1, H, W, 3]` on the CPU.

    The numbers of `vae.decode` without tiling, whatever memory there is, rounded to uint8 for a `bit_depth` of 8, else
    to uint16. Tiles hold all of their time, so that the first frame is there when the last is: the whole clip waits in
    3 or 6 bytes per pixel.
    vae: on any device; its decoder's weights are copied to `device`. `say` is told what the decode resorts to.
    ranks: processes that share the decode; this is for rank 0, and all others call `help_decode` meanwhile.
    report: takes the tiles and how even the shares are, where ranks share.
    """
    check_latents(latents, vae)
    from tqdm import tqdm

    decoder = WanDecoder.from_state_dict(vae.state_dict(), device, vae.dtype)
    _, _, frames, height, width = latents.shape
    scale, dtype = decoder.structure.scale, torch.uint8 if bit_depth == 8 else torch.uint16
    out = torch.empty(1, frame_count(frames), height * scale, width * scale, 3, dtype=dtype)
    with tqdm(desc="decoding tiles", leave=False, bar_format=_BAR) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if ranks is None or ranks.size == 1:
            decode_in_tiles(decoder, latents, out=out, progress=progress, say=say)
        else:
            from .vae.shared_decode import decode_shared

            decode_shared(decoder, latents, ranks, out=out, progress=progress, say=say, report=report)
    del decoder
    yield from out[0].split(1)


def help_decode(vae: AutoencoderKLWan, device: torch.device, ranks: Ranks, report: dict | None = None) -> None:
    """What all ranks but 0 do while that one takes the frames of `decode_frames`: their share of the decode.

    vae, device, report: as there. Raises what ends the decode on this rank.
    """
    from .vae.shared_decode import decode_shared

    decode_shared(WanDecoder.from_state_dict(vae.state_dict(), device, vae.dtype), None, ranks, report=report)
