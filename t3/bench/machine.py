"""What figures depend on: the card, the versions, and the two ceilings measured on it."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from .timing import milliseconds

# Distributions whose version decides a figure, where they are installed.
PACKAGES = ("triton", "diffusers", "flash-attn", "flash-attn-4", "sageattention", "comfy-kitchen")


def pick_device() -> torch.device:
    """The current CUDA card, by number since some calls need that, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> dict[str, str | float]:
    """Card and versions, as they go into results: flat, only text and numbers."""
    found: dict[str, str | float] = {
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"machine": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        found |= {"cuda": str(torch.version.cuda or torch.version.hip), "cudnn": str(torch.backends.cudnn.version())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: bfloat16 matrix products in TFLOP/s, a copy in TB/s read and written."""

    matmul_tflops: float
    copy_tb_s: float

    def floor_ms(self, macs: float) -> float:
        """Milliseconds that so many multiply-accumulates (two FLOPs each) take at the matmul ceiling."""
        return 2 * macs / self.matmul_tflops / 1e9


def measure_ceilings(device: torch.device, tiny: bool = False) -> Ceilings:
    """Measured, not looked up: one 8192^3 product and a copy of 2 GiB, the medians of several; about a second."""
    size, count = (256, 2**20) if tiny or device.type == "cpu" else (8192, 2**30)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    matmul = milliseconds(lambda: a @ b, device, 15, 5)
    source, target = (torch.empty(count, dtype=torch.bfloat16, device=device).fill_(1) for _ in range(2))
    copy = milliseconds(lambda: target.copy_(source), device, 9, 2)
    return Ceilings(2 * size**3 / matmul / 1e9, 4 * count / copy / 1e9)


def machine_line(found: dict, ceilings: dict | None) -> str:
    """One line for people, from `machine()` and the fields of `Ceilings`."""
    parts = [str(found["machine"]), f"torch {found['torch']}"]
    for name in ("cuda", "cudnn", *PACKAGES):
        if name in found:
            parts.append(f"{name} {found[name]}")
    if ceilings:
        parts.append(f"matmul {ceilings['matmul_tflops']:.4g} TFLOP/s")
        parts.append(f"copy {ceilings['copy_tb_s']:.3g} TB/s")
    return " | ".join([*parts, str(found["date"])])
