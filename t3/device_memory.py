"""How much memory a device has for this process."""

from __future__ import annotations

import torch


def allowed_bytes(device: torch.device) -> int | None:
    """Bytes this process may hold on `device` by `torch.cuda.set_per_process_memory_fraction`, or None: no limit."""
    if device.type != "cuda":
        return None
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return None if fraction >= 1 else int(fraction * torch.cuda.get_device_properties(device).total_memory)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, those torch keeps for reuse included; None where unknown (CPU)."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return within_limit(free + kept, device)


def within_limit(free: int, device: torch.device) -> int:
    """`free`, or what the process may still allocate where that is less."""
    allowed = allowed_bytes(device)
    return free if allowed is None else min(free, allowed - torch.cuda.memory_allocated(device))
