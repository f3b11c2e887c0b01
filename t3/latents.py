"""Latents to and from ComfyUI's `.latent` files, so that a clip can be sampled here and decoded there, or later.

The layout is the host's: a safetensors file with `latent_tensor` and an empty `latent_format_version_0`. Files
without that second key are older, and their values are in another scale.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import T3Error
from .files import atomic_path, check_output, json_text, utf8_text

if TYPE_CHECKING:
    import torch

OUR_KEY = "t3"  # the metadata entry of this program; the host's own are "prompt" and "workflow"
_TENSOR, _VERSION = "latent_tensor", "latent_format_version_0"
_UNVERSIONED_SCALE = 1 / 0.18215  # what LoadLatent multiplies by when the version key is missing
_VAES = {16: "the Wan 2.1 VAE, also used by Wan 2.2 14B", 48: "the Wan 2.2 VAE, used by Wan 2.2 5B"}
_LOG = logging.getLogger(__name__)


def save_latents(
    path: str | os.PathLike[str],
    latents: torch.Tensor,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write latents that ComfyUI's LoadLatent and `load_latents` open. Returns the absolute path.

    Args:
        path: the final file, by custom `*.latent`. It appears only once it is complete.
        latents: `[B, C, T, H, W]` as a VAE decode takes them, any float dtype and device; stored as float32.
        metadata: strings, and under the key "t3" anything JSON can hold (prompt, seed, size, fps).
        overwrite: whether to replace an existing file.

    Raises:
        T3Error: another rank or channel count, NaN or infinity (their number is named), metadata of other types,
            or an output that cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _check_channels(latents, "These latents")
    if latents.ndim != 5 or not latents.numel():
        raise T3Error(f"Latents of shape {list(latents.shape)} cannot be saved. Give [B, C, T, H, W], all at least 1.")
    latents = latents.detach().to("cpu", torch.float32)
    _check_finite(latents, "These latents are not saved")
    text = _encode_metadata(metadata)
    final = check_output(path, overwrite, latents.numel() * 4)
    with atomic_path(final, overwrite) as temp:
        try:
            save_file({_TENSOR: latents.contiguous(), _VERSION: torch.empty(0)}, temp, metadata=text or None)
        except (SafetensorError, OSError) as error:
            raise T3Error(f"{final} could not be written: {error}. Check the free space of that disk.") from error
    return final


def load_latents(path: str | os.PathLike[str]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Read a `.latent` file: latents `[B, C, T, H, W]` in float32 on the CPU, and the file's metadata.

    Image latents `[B, C, H, W]` come back as one frame. Files without the version key are rescaled as the host
    does, and a line in the log says so. The metadata are the strings of the file, "t3" decoded from JSON.

    Raises:
        T3Error: no such file, not safetensors or cut short, no `latent_tensor`, another rank, channels of no Wan
            VAE, NaN or infinity (their number is named).
    """
    import torch
    from safetensors import SafetensorError, safe_open

    file = Path(path).absolute()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise T3Error(f"{file} {what}. Give a .latent file, as SaveLatent or --latents-out writes it.")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            stored = opened.get_tensor(_TENSOR) if _TENSOR in keys else None
            text = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise T3Error(
            f"{file} cannot be read as safetensors ({error}): it is another kind of file, or was cut short in a "
            "copy or download. Copy it again, or save the latents again."
        ) from error
    if stored is None:
        raise T3Error(
            f"{file} holds no {_TENSOR!r} (it holds {_some(keys)}), so it is no latent file. "
            "Give a .latent file, as SaveLatent or --latents-out writes it."
        )
    # A copy, because the tensor may be a view of the mapped file.
    latents = stored.to(torch.float32, copy=True)
    if latents.ndim == 4:
        latents = latents.unsqueeze(2)
    _check_channels(latents, str(file))
    if latents.ndim != 5 or not latents.numel():
        raise T3Error(f"{file} holds a tensor of shape {list(stored.shape)}. Video latents are [B, C, T, H, W].")
    _check_finite(latents, f"{file} cannot be decoded")
    if _VERSION not in keys:
        _LOG.warning("%s has no %r: its values are multiplied by 1/0.18215, as LoadLatent does.", file, _VERSION)
        latents.mul_(_UNVERSIONED_SCALE)
    return latents, _decode_metadata(text)


def _check_channels(latents: torch.Tensor, name: str) -> None:
    channels = latents.shape[1] if latents.ndim == 5 else None
    if channels is not None and channels not in _VAES:
        known = ", ".join(f"{count} ({vae})" for count, vae in _VAES.items())
        raise T3Error(
            f"{name}: {channels} channels, and Wan's VAEs have {known}. Use latents sampled with a Wan model."
        )


def _check_finite(latents: torch.Tensor, name: str) -> None:
    import torch

    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        raise T3Error(
            f"{name}: {bad} of {latents.numel()} values are NaN or infinite. Sample again, with another dtype "
            "(bfloat16 rather than float16) or backend if it happens again."
        )


def _encode_metadata(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    text = {}
    for key, value in (metadata or {}).items():
        if key == OUR_KEY:
            try:
                value = json_text(value)
            except (TypeError, ValueError) as error:
                raise T3Error(f"The metadata {OUR_KEY!r} cannot be stored as JSON: {error}.") from error
        if not isinstance(key, str) or not isinstance(value, str):
            raise T3Error(f"The metadata {key!r} is no string. Put values of other types under {OUR_KEY!r}.")
        text[key] = utf8_text(value)
    return text


def _decode_metadata(text: Mapping[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = dict(text)
    if OUR_KEY in metadata:
        try:
            metadata[OUR_KEY] = json.loads(metadata[OUR_KEY])
        except ValueError:
            _LOG.warning("The metadata %r of this file are no JSON, and stay a string.", OUR_KEY)
    return metadata


def _some(keys: list[str]) -> str:
    shown = ", ".join(sorted(keys)[:3]) or "nothing"
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown
