"""Latents to frames with diffusers' Wan VAE, a latent frame at a time, so that progress shows and memory stays low."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from .errors import T3Error

Say = Callable[[str], None]


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


@torch.inference_mode()
def decode_frames(vae: AutoencoderKLWan, latents: torch.Tensor, device: torch.device, say: Say) -> Iterator:
    """Decode `[1, C, T, H, W]` latents in the VAE's space. Yields frames `[n, H, W, 3]` float32 in [0, 1] on the CPU.

    The same arithmetic as `vae.decode`. Where the whole picture does not fit the card, the rest of the clip is decoded
    in diffusers' overlapping tiles, which blend and so are not exact; `say` is told once.
    """
    check_latents(latents, vae)
    latents = latents.to(device, vae.dtype)
    done = 0
    try:
        for piece in _latent_frame_by_frame(vae, latents):
            yield _pixels(piece)
            done += piece.shape[2]
        return
    except torch.OutOfMemoryError:
        vae.clear_cache()
        say(
            "decode: the whole picture does not fit this card's memory; going on with diffusers' blended tiles, "
            "which are close but not exact."
        )
    torch.cuda.empty_cache()
    vae.enable_tiling()
    try:
        yield _pixels(vae.decode(latents).sample[:, :, done:])
    finally:
        vae.disable_tiling()


def _latent_frame_by_frame(vae: AutoencoderKLWan, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:  # model offload moves the VAE in when `decode` is called, which is not called here
        hook.pre_forward(vae)
    vae.clear_cache()
    try:
        hidden = vae.post_quant_conv(latents)
        for i in range(hidden.shape[2]):
            vae._conv_idx = [0]
            out = vae.decoder(
                hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0
            )
            if vae.config.patch_size is not None:
                out = unpatchify(out, patch_size=vae.config.patch_size)
            yield out
    finally:
        vae.clear_cache()


def _pixels(video: torch.Tensor) -> torch.Tensor:
    """`[1, 3, n, H, W]` in [-1, 1] and beyond to `[n, H, W, 3]` in [0, 1], on the CPU."""
    return video[0].float().clamp(-1, 1).add(1).div(2).permute(1, 2, 3, 0).cpu()
