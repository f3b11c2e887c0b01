"""Whether Triton kernels can be used."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

log = logging.getLogger(__name__)


def triton_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels run on this device and take this dtype. Where only Triton is missing, says so once."""
    if device.type != "cuda" or torch.version.hip is not None or dtype.itemsize > 4:
        return False
    return _installed()


@functools.cache
def _installed() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        log.warning("T3: Triton is not installed, so plain torch does the work of our kernels, slower. See README.")
    return found
