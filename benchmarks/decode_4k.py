"""Time `t3.vae.decode_frames` at 4K beside ComfyUI's own decodes, and say how far each is from the exact picture.

    python benchmarks/decode_4k.py --vaes 2.1 2.2 --out results.json

Needs a GPU and ComfyUI (`python tests/host/install.py`, or `--comfyui FOLDER`). Weights are random, of the real sizes:
speed and memory do not depend on them; errors do, since random attention mixes more than trained attention does.
"""

from __future__ import annotations

import argparse
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
LATENT_FRAMES, FEW_LATENT_FRAMES = 21, 6
GIB = 2**30


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


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """The result, with seconds and the peak of memory beyond what lay on the card before."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    return result, {"seconds": round(seconds, 2), "peak_gib": round(peak / GIB, 2)}


def ours(sd, latents, dtype=torch.bfloat16, out_dtype=torch.uint8, **options) -> torch.Tensor:
    """Frames `[B, frames, H, W, 3]` in main memory."""
    from t3.vae import WanDecoder, decode_frames

    decoder = WanDecoder.from_state_dict(sd, "cuda", dtype)
    structure = decoder.structure
    batch, _, frames, height, width = latents.shape
    shape = (batch, structure.frames(frames), height * structure.scale, width * structure.scale, 3)
    return decode_frames(decoder, latents, out=torch.empty(shape, dtype=out_dtype), **options)


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


def speed(name: str, sd, tiny: bool) -> dict:
    """Rows of time and memory, at 4K."""
    channels, height, width = VAES[name]
    if tiny:
        height, width = height // 8, width // 8
    latents = torch.randn(1, channels, LATENT_FRAMES, height, width, generator=torch.Generator().manual_seed(1))
    few = latents[:, :, :FEW_LATENT_FRAMES]
    runs = {
        f"ours, {LATENT_FRAMES} latent frames": lambda: ours(sd, latents),
        f"ours, {FEW_LATENT_FRAMES} latent frames": lambda: ours(sd, few),
        f"ours, {FEW_LATENT_FRAMES} latent frames, 12 GiB": lambda: ours(sd, few, memory=12 * GIB),
        f"ours, {FEW_LATENT_FRAMES} latent frames, 6 GiB": lambda: ours(sd, few, memory=6 * GIB),
        f"ComfyUI tiled, {FEW_LATENT_FRAMES} latent frames": lambda: host_tiled(host_vae(sd, torch.bfloat16), few),
    }
    rows = {}
    for label, run in runs.items():
        try:
            rows[label] = timed(run)[1]
        except Exception as problem:
            rows[label] = f"failed: {type(problem).__name__}: {problem}"
        print(name, label, json.dumps(rows[label]), flush=True)
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
    }
    rows = {}
    for label, run in runs.items():
        try:
            rows[label] = error(run().cpu(), truth)
        except Exception as problem:
            rows[label] = f"failed: {type(problem).__name__}: {problem}"
        print(name, label, json.dumps(rows[label]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="+", choices=VAES, default=list(VAES))
    parser.add_argument("--comfyui", type=Path, default=host_comfy.COMFYUI)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    host_comfy.load(options.comfyui.resolve(), cpu=False)
    results: dict = {
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
        }
    }
    with torch.inference_mode():
        for name in options.vaes:
            sd = weights(name, options.tiny)
            results[name] = {"exactness": exactness(name, sd, options.tiny), "speed": speed(name, sd, options.tiny)}
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
