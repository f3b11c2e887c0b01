"""Time `t3.vae.decode_frames` at 4K beside ComfyUI's own decodes, and say how far each is from the exact picture.

    python benchmarks/decode_4k.py --vaes 2.1 2.2 --out results.json

Needs a GPU and ComfyUI (`python tests/host/install.py`, or `--comfyui FOLDER`). Weights are random, of the real sizes:
speed and memory do not depend on them; errors do, since random attention mixes more than trained attention does.
A row of ours "in 8 GiB" runs with all of the process, weights included, held to that much of the card.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/host"))

import host_comfy
import torch

VAES = {"2.1": (16, 272, 480), "2.2": (48, 136, 240)}
LATENT_FRAMES = 21
BOUNDS = (8, 12, 24, 79)  # GiB; the last is the card
GIB = 2**30
# Of all convolutions and attention at that size, twice the multiplications; and what a large matrix product reaches.
WORK, CEILING = {"2.1": 6.5e15, "2.2": 13.0e15}, 783e12


def weights(name: str, tiny: bool) -> dict[str, torch.Tensor]:
    """A VAE's state dict under the original names, float16."""
    import comfy.ldm.wan.vae
    import comfy.ldm.wan.vae2_2
    from host_standins import random_state

    build, width = (
        (comfy.ldm.wan.vae.WanVAE, 8 if tiny else 96)
        if name == "2.1"
        else (comfy.ldm.wan.vae2_2.WanVAE, 16 if tiny else 160)
    )
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        vae = build(dim=width, z_dim=VAES[name][0], **shape)
    return random_state(vae, 5)


def timed(work: Callable[[], torch.Tensor], bound: float | None = None) -> tuple[torch.Tensor, dict]:
    """The result, with seconds and the most that torch held on the card. bound: GiB that torch may hold there."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, bound * GIB / total) if bound else 1.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        result = work()
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    seconds = time.perf_counter() - start
    used, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return result, {"seconds": round(seconds, 2), "peak_gib": round(used / GIB, 2), "held_gib": round(held / GIB, 2)}


def ours(sd, latents, dtype=torch.bfloat16, out=torch.uint8, bound=None, told=None, **options) -> torch.Tensor:
    """Frames `[B, frames, H, W, 3]` in main memory. bound: GiB for weights and work; told: takes what is said."""
    from t3.vae import WanDecoder, decode_frames

    decoder = WanDecoder.from_state_dict(sd, "cuda", dtype)
    structure = decoder.structure
    batch, _, frames, height, width = latents.shape
    shape = (batch, structure.frames(frames), height * structure.scale, width * structure.scale, 3)
    if bound:
        options["memory"] = int(bound * GIB) - torch.cuda.memory_allocated()
    say = print if told is None else told.append
    return decode_frames(decoder, latents, out=torch.empty(shape, dtype=out), say=say, **options)


def diffusers_tiled(sd, latents) -> torch.Tensor:
    """AutoencoderKLWan with `enable_tiling()` and its defaults, float32."""
    from diffusers import AutoencoderKLWan

    from t3.weights import known_config
    from t3.weights.layout_vae import vae_layout

    name = "wan2.1-vae" if latents.shape[1] == 16 else "wan2.2-vae"
    config = {key: value for key, value in known_config(name).items() if not key.startswith("_")}
    with torch.device("cuda"):
        model = AutoencoderKLWan(**config)
    model.load_state_dict({param.name: sd[key] for key, param in vae_layout(config).items()}, strict=True)
    model.eval().enable_tiling()
    video = model.decode(latents.cuda()).sample
    return ((video + 1) / 2).clamp(0, 1).movedim(1, -1)


def host_untiled(sd, latents) -> torch.Tensor:
    """ComfyUI's model in bfloat16, whole pictures. By itself: `VAE.decode` would go on in tiles if memory ran out."""
    model = host_vae(sd, torch.bfloat16).first_stage_model.to("cuda", torch.bfloat16)
    return model.decode(latents.to("cuda", torch.bfloat16))


def host_tiled(vae, latents) -> torch.Tensor:
    """VAE Decode (Tiled) with its defaults."""
    import nodes

    (frames,) = nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, 512, 64, 64, 8)
    return frames


def error(found: torch.Tensor, truth: torch.Tensor) -> dict:
    """Of pixels in [0, 1]: root mean square, largest, and PSNR in dB."""
    difference = found.double().reshape(truth.shape) - truth.double()
    rms = difference.square().mean().sqrt().item()
    return {
        "rms": float(f"{rms:.3g}"),
        "max": float(f"{difference.abs().max().item():.3g}"),
        "psnr_db": round(-20 * math.log10(max(rms, 1e-12)), 1),
    }


def host_vae(sd, dtype):
    import comfy.sd

    return comfy.sd.VAE(sd=dict(sd), dtype=dtype)


def machine() -> dict:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
    }


def note(rows: dict, name: str, label: str, work: Callable[[], dict]) -> None:
    try:
        rows[label] = work()
    except Exception as problem:
        rows[label] = f"failed: {type(problem).__name__}: {str(problem)[:200]}"
    print(name, label, json.dumps(rows[label]), flush=True)


def speed(name: str, sd, tiny: bool, only: list[str]) -> dict:
    """Rows of time and memory, at 4K."""
    channels, height, width = VAES[name]
    if tiny:
        height, width = height // 8, width // 8
    latents = torch.randn(1, channels, LATENT_FRAMES, height, width, generator=torch.Generator().manual_seed(1))
    rows: dict = {}
    ours(sd, latents[:, :, :2, :16, :16])  # kernels are compiled, libraries loaded
    host_vae(sd, torch.bfloat16).decode(latents[:, :, :2, :16, :16])

    def bounded(bound: int) -> dict:
        told: list[str] = []
        row = timed(lambda: ours(sd, latents, bound=bound, told=told), bound)[1]
        return {**row, "percent_of_floor": round(100 * WORK[name] / CEILING / row["seconds"], 1), "told": told}

    runs: dict[str, Callable[[], dict]] = {
        f"ours, in {bound} GiB": lambda bound=bound: bounded(bound) for bound in BOUNDS
    }
    runs["ComfyUI tiled"] = lambda: timed(lambda: host_tiled(host_vae(sd, torch.bfloat16), latents))[1]
    runs["ComfyUI untiled"] = lambda: timed(lambda: host_untiled(sd, latents))[1]
    for label, run in runs.items():
        if not only or any(word in label for word in only):
            note(rows, name, label, run)
    return rows


def exactness(name: str, sd, tiny: bool) -> dict:
    """Errors against the untiled float32 decode, on a picture small enough for that."""
    channels, height, width = VAES[name]
    height, width = (height // 16, width // 16) if tiny else (height // 4, width // 4)
    latents = torch.randn(1, channels, 3, height, width, generator=torch.Generator().manual_seed(2))
    truth = host_vae(sd, torch.float32).decode(latents).cpu()
    tile = 128 if name == "2.1" else 256
    runs = {
        "ours, float32, tiles": lambda: ours(sd, latents, torch.float32, torch.float32, tile=tile),
        "ours, bfloat16, tiles": lambda: ours(sd, latents, torch.bfloat16, torch.float32, tile=tile),
        "ComfyUI, bfloat16, untiled": lambda: host_vae(sd, torch.bfloat16).decode(latents),
        "ComfyUI tiled, float32": lambda: host_tiled(host_vae(sd, torch.float32), latents),
        "diffusers tiled, float32": lambda: diffusers_tiled(sd, latents),
    }
    rows: dict = {}
    for label, run in runs.items():
        note(rows, name, label, lambda run=run: error(run().cpu(), truth))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="+", choices=VAES, default=list(VAES))
    parser.add_argument("--comfyui", type=Path, default=host_comfy.COMFYUI)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows of time whose name has such a word")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    host_comfy.load(options.comfyui.resolve(), cpu=False)
    results: dict = {"machine": machine()}
    with torch.inference_mode():
        for name in options.vaes:
            sd = weights(name, options.tiny)
            results[name] = {}
            if not options.only:
                results[name]["exactness"] = exactness(name, sd, options.tiny)
            results[name]["speed"] = speed(name, sd, options.tiny, options.only)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
