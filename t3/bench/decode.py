"""`t3.bench decode`: the exact tiled decode at 4K within bounds of memory, and how far decodes are from the truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..memory import GIB
from ..vae import WanDecoder, decode_frames
from ..weights import known_config
from ..weights.layout_vae import vae_layout
from .report import Report
from .timing import release
from .transformer import diffusers_refusal

TABLE, ERRORS = "decode", "decode errors"
# Config, and the latents of 2176x3840 pixels.
VAES = {"2.1": ("wan2.1-vae", (16, 272, 480)), "2.2": ("wan2.2-vae", (48, 136, 240))}
LATENT_FRAMES = 21
BOUNDS = (8, 12, 24)  # GiB; the last row has all of the card
# Multiplications of all convolutions and attention at that size, twice: FLOPs. The first latent frame gives one picture
# and a third of the work of another, which gives four.
WORK = {"2.1": 6.285e15, "2.2": 12.58e15}
RANDOM = "random weights, whose attention mixes more than trained weights' does"
State = dict[str, torch.Tensor]


def random_vae(name: str, tiny: bool = False) -> State:
    """A VAE's state dict under the original names, float16: random, at a scale that keeps what passes through."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for key, param in vae_layout(vae_settings(name, tiny)).items():
        noise = torch.randn(param.shape, generator=generator)
        if key.endswith("gamma"):
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.2 if noise.ndim == 1 else 1 / math.sqrt(math.prod(noise.shape[1:]))
        state[key] = noise.half()
    return state


def vae_settings(name: str, tiny: bool = False) -> dict[str, Any]:
    """diffusers' config of a VAE; tiny: a narrow one."""
    found = {key: value for key, value in known_config(VAES[name][0]).items() if not key.startswith("_")}
    narrow = {"base_dim": 8, "decoder_base_dim": 8 if found["decoder_base_dim"] else None}
    return found | (narrow if tiny else {})


def random_latents(name: str, frames: int, cut: int = 1, seed: int = 1) -> torch.Tensor:
    """`[1, C, frames, H, W]` of 4K pixels, both sides divided by `cut`."""
    _, (channels, height, width) = VAES[name]
    shape = (1, channels, frames, height // cut, width // cut)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(
    sd: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.dtype = torch.uint8,
    *,
    bound: float | None = None,
    told: list[str] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Frames `[B, frames, H, W, 3]` in main memory, the building of the decoder included.

    bound: GiB for weights and work together; told: takes what the decode says.
    """
    decoder = WanDecoder.from_state_dict(sd, device, dtype)
    structure = decoder.structure
    batch, _, frames, height, width = latents.shape
    shape = (batch, structure.frames(frames), height * structure.scale, width * structure.scale, 3)
    if bound:
        options["memory"] = int(bound * GIB) - torch.cuda.memory_allocated(device)
    say = print if told is None else told.append
    return decode_frames(decoder, latents, out=torch.empty(shape, dtype=out), say=say, **options)


def by_diffusers(
    sd: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    device: torch.device,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    tiled: bool = False,
) -> torch.Tensor:
    """Frames as `ours`, on the device, by diffusers' `AutoencoderKLWan`, in its tiles of default size or untiled."""
    from diffusers import AutoencoderKLWan

    with torch.device(device):
        model = AutoencoderKLWan(**settings)
    model.load_state_dict({param.name: sd[key] for key, param in vae_layout(settings).items()}, strict=True)
    model = model.to(dtype).eval()
    if tiled:
        model.enable_tiling()
    video = model.decode(latents.to(device, dtype)).sample
    return ((video + 1) / 2).clamp(0, 1).movedim(1, -1)


def held_to(work: Callable[[], torch.Tensor], device: torch.device, bound: float | None = None) -> dict[str, float]:
    """Seconds and the most that torch held on the card. bound: GiB that torch may hold there, weights included."""
    cuda = device.type == "cuda"
    release(device)
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, bound * GIB / total) if bound else 1.0, device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    try:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    found = {"seconds": time.perf_counter() - begin}
    if cuda:
        used, held = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        found |= {"peak_gib": used / GIB, "held_gib": held / GIB}
    return found


def picture_error(found: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Of pixels in [0, 1]: root mean square, largest, and PSNR in dB."""
    difference = found.double().cpu().reshape(truth.shape) - truth.double().cpu()
    rms = difference.square().mean().sqrt().item()
    return {"rms": rms, "max": difference.abs().max().item(), "psnr_db": -20 * math.log10(max(rms, 1e-12))}


def run_decode(report: Report, vaes: list[str]) -> None:
    """Rows of errors, then of time and memory, of each VAE."""
    for name in vaes:
        sd = random_vae(name, report.tiny)
        label = f"Wan{name} VAE, {RANDOM}"
        if not report.over(ERRORS, label, "all rows"):
            _errors(report, name, sd, label)
            report.show(ERRORS, label)
        label = f"Wan{name} VAE, {'small' if report.tiny else '3840x2176, 81 frames'}"
        if not report.over(TABLE, label, "all rows"):
            _speed(report, name, sd, label)
            report.show(TABLE, label)


def _errors(report: Report, name: str, sd: State, label: str) -> None:
    device, settings = report.device, vae_settings(name, report.tiny)
    latents = random_latents(name, 2 if report.tiny else 3, 32 if report.tiny else 8, seed=2)
    held: list[torch.Tensor] = []

    def truth() -> dict[str, Any]:
        video = WanDecoder.from_state_dict(sd, device, torch.float64).untiled(latents.double())
        held.append(((video + 1) / 2).clamp(0, 1).movedim(1, -1).cpu())
        return {"pixels": "x".join(map(str, held[0].shape[1:4]))}

    report.run(ERRORS, label, "truth", truth, note="our decoder, float64, whole pictures")
    if not held:
        return
    tile = (32 if report.tiny else 128) * (2 if name == "2.2" else 1)
    works: dict[str, Callable[[], torch.Tensor]] = {
        "ours, float32, tiles": lambda: ours(sd, latents, device, torch.float32, torch.float32, tile=tile),
        "ours, bfloat16, tiles": lambda: ours(sd, latents, device, torch.bfloat16, torch.float32, tile=tile),
    }
    if why := diffusers_refusal():
        report.absent(ERRORS, label, "diffusers", why)
    else:
        half = torch.bfloat16
        works |= {
            "diffusers, float32, untiled": lambda: by_diffusers(sd, latents, device, settings),
            "diffusers, bfloat16, untiled": lambda: by_diffusers(sd, latents, device, settings, dtype=half),
            "diffusers, float32, tiled": lambda: by_diffusers(sd, latents, device, settings, tiled=True),
        }
    for variant, work in works.items():

        def row(work: Callable[[], torch.Tensor] = work) -> dict[str, float]:
            return picture_error(work(), held[0])

        report.run(ERRORS, label, variant, row)


def _speed(report: Report, name: str, sd: State, label: str) -> None:
    device, settings = report.device, vae_settings(name, report.tiny)
    latents = random_latents(name, 2 if report.tiny else LATENT_FRAMES, 32 if report.tiny else 1)
    ours(sd, latents[:, :, :2, :16, :16], device)  # kernels are compiled, libraries loaded
    if not report.tiny:
        floor = WORK[name] / report.ceilings.matmul_tflops / 1e12
        report.run(TABLE, label, "floor", lambda: {"seconds": floor})
    if why := diffusers_refusal():
        report.absent(TABLE, label, "diffusers", why)
    else:
        for variant, tiled in (("diffusers, tiled", True), ("diffusers, untiled", False)):

            def work(some: torch.Tensor, tiled=tiled) -> torch.Tensor:
                return by_diffusers(sd, some, device, settings, dtype=torch.bfloat16, tiled=tiled)

            def row(work=work) -> dict[str, float]:
                work(latents[:, :, :2, :16, :16])  # imported, and loaded, as ours is
                return held_to(lambda: work(latents), device)

            report.run(TABLE, label, variant, row, peer=True)

    def bounded(bound: float | None) -> dict[str, Any]:
        told: list[str] = []
        found = held_to(lambda: ours(sd, latents, device, bound=bound, told=told), device, bound)
        return found | ({"told": "; ".join(told)} if told else {})

    for bound in BOUNDS if device.type == "cuda" else ():
        report.run(TABLE, label, f"ours, in {bound} GiB", partial(bounded, bound))
    report.run(TABLE, label, "ours, all of the memory", lambda: bounded(None))
