"""Whether Triton kernels can be used."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

log = logging.getLogger(__name__)

# Looked up once, outside what torch may compile; nothing is imported.
_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels run on this device and take this dtype. Where only Triton is missing, says so once."""
    if device.type != "cuda" or torch.version.hip is not None or dtype.itemsize > 4:
        return False
    if not _INSTALLED and not torch.compiler.is_compiling():
        _tell()
    return _INSTALLED


@functools.cache
def _tell() -> None:
    log.warning("T3: Triton is not installed, so plain torch does the work of our kernels, slower. See README.")
