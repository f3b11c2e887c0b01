"""Time `t3.vae.decode_frames` at 4K beside ComfyUI's own decodes, and say how far each is from the exact picture.

    python benchmarks/decode_4k.py --vaes 2.1 2.2 --out results.json

Needs a GPU and ComfyUI (`python tests/host/install.py`, or `--comfyui FOLDER`). `python -m t3.bench decode` has the
rows that need no ComfyUI, and the code that measures all of them. Weights are random, of the real sizes: speed and
memory do not depend on them; errors do, since random attention mixes more than trained attention does. A row of ours
"in 8 GiB" runs with all of the process, weights included, held to that much of the card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/host"))

import host_comfy
import torch
from keep import parse_with_out, save

from t3.bench.decode import (
    BOUNDS,
    LATENT_FRAMES,
    VAES,
    WORK,
    by_diffusers,
    held_to,
    ours,
    picture_error,
    random_latents,
    vae_settings,
)
from t3.bench.machine import Ceilings, machine, measure_ceilings
from t3.bench.timing import round3

DEVICE = torch.device("cuda", 0)
CARD = 79  # GiB of an H100 of 80 GB


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
        vae = build(dim=width, z_dim=VAES[name][1][0], **shape)
    return random_state(vae, 5)


def host_untiled(sd, latents) -> torch.Tensor:
    """ComfyUI's model in bfloat16, whole pictures. By itself: `VAE.decode` would go on in tiles if memory ran out."""
    model = host_vae(sd, torch.bfloat16).first_stage_model.to("cuda", torch.bfloat16)
    return model.decode(latents.to("cuda", torch.bfloat16))


def host_tiled(vae, latents) -> torch.Tensor:
    """VAE Decode (Tiled) with its defaults."""
    import nodes

    (frames,) = nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, 512, 64, 64, 8)
    return frames


def host_vae(sd, dtype):
    import comfy.sd

    return comfy.sd.VAE(sd=dict(sd), dtype=dtype)


def note(rows: dict, name: str, label: str, work: Callable[[], dict]) -> None:
    try:
        rows[label] = work()
    except Exception as problem:
        rows[label] = f"failed: {type(problem).__name__}: {str(problem)[:200]}"
    print(name, label, json.dumps(rows[label]), flush=True)


def figures(row: dict[str, float]) -> dict[str, float]:
    return {key: round3(value) for key, value in row.items()}


def speed(name: str, sd, tiny: bool, only: list[str], ceilings: Ceilings) -> dict:
    """Rows of time and memory, at 4K."""
    floor = WORK[name] / ceilings.matmul_tflops / 1e12
    latents = random_latents(name, LATENT_FRAMES, 8 if tiny else 1)
    rows: dict = {}
    ours(sd, latents[:, :, :2, :16, :16], DEVICE)  # kernels are compiled, libraries loaded
    host_vae(sd, torch.bfloat16).decode(latents[:, :, :2, :16, :16])

    def timed(work: Callable[[], torch.Tensor], bound: int | None = None) -> dict:
        return figures(held_to(work, DEVICE, bound))

    def bounded(bound: int) -> dict:
        told: list[str] = []
        row = timed(lambda: ours(sd, latents, DEVICE, bound=bound, told=told), bound)
        return {**row, "percent_of_floor": round(100 * floor / row["seconds"], 1), "told": told}

    runs: dict[str, Callable[[], dict]] = {
        f"ours, in {bound} GiB": lambda bound=bound: bounded(bound) for bound in (*BOUNDS, CARD)
    }
    runs["ComfyUI tiled"] = lambda: timed(lambda: host_tiled(host_vae(sd, torch.bfloat16), latents))
    runs["ComfyUI untiled"] = lambda: timed(lambda: host_untiled(sd, latents))
    for label, run in runs.items():
        if not only or any(word in label for word in only):
            note(rows, name, label, run)
    return rows


def exactness(name: str, sd, tiny: bool) -> dict:
    """Errors against the untiled float32 decode, on a picture small enough for that."""
    latents = random_latents(name, 3, 16 if tiny else 4, seed=2)
    settings = vae_settings(name)
    truth = host_vae(sd, torch.float32).decode(latents).cpu()
    tile = 128 if name == "2.1" else 256
    runs = {
        "ours, float32, tiles": lambda: ours(sd, latents, DEVICE, torch.float32, torch.float32, tile=tile),
        "ours, bfloat16, tiles": lambda: ours(sd, latents, DEVICE, torch.bfloat16, torch.float32, tile=tile),
        "ComfyUI, bfloat16, untiled": lambda: host_vae(sd, torch.bfloat16).decode(latents),
        "ComfyUI tiled, float32": lambda: host_tiled(host_vae(sd, torch.float32), latents),
        "diffusers tiled, float32": lambda: by_diffusers(sd, latents, DEVICE, settings, tiled=True),
    }
    rows: dict = {}
    for label, run in runs.items():
        note(rows, name, label, lambda run=run: figures(picture_error(run(), truth)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="+", choices=VAES, default=list(VAES))
    parser.add_argument("--comfyui", type=Path, default=host_comfy.COMFYUI)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows of time whose name has such a word")
    options = parse_with_out(parser, card=True)
    host_comfy.load(options.comfyui.resolve(), cpu=False)
    ceilings = measure_ceilings(DEVICE, options.tiny)
    results: dict = {"machine": machine(DEVICE) | {"command": " ".join(sys.argv)}, "ceilings": asdict(ceilings)}
    with torch.inference_mode():
        for name in options.vaes:
            sd = weights(name, options.tiny)
            results[name] = {}
            if not options.only:
                results[name]["exactness"] = exactness(name, sd, options.tiny)
            results[name]["speed"] = speed(name, sd, options.tiny, options.only, ceilings)
            save(options.out, results)


if __name__ == "__main__":
    main()
