"""T3 VAE Decode to Video at 4K in ComfyUI: seconds, the most main memory, and how soon Cancel stops it.

    python benchmarks/decode_nodes_4k.py --out results.json

Needs a GPU and ComfyUI (`python tests/host/install.py`, or `--comfyui FOLDER`). Random weights of the real size
(Wan2.1), 81 frames, the video written as H.264.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/host"))

import decode_4k
import host_comfy
import torch
from keep import parse_with_out, save
from most import Most

from t3.bench.decode import LATENT_FRAMES, random_latents
from t3.bench.machine import machine

CANCEL_AFTER = 4.0  # seconds


def main_memory() -> int:
    """Anonymous and shared main memory of this process, in bytes.

    Pages of mapped files are left out: the system takes them back when it wants them.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return sizes["RssAnon"] + sizes["RssShmem"]


def to_video(node, vae, samples, depth: int, folder: Path) -> dict:
    """Decode and save; seconds and memory of both."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    gc.collect()
    with Most(main_memory, every=0.02) as memory:
        start = time.perf_counter()
        video, report = node.execute(samples, vae, 30.0, bit_depth=depth, crop=2160).result
        decoded = time.perf_counter() - start
        video.save_to(str(folder / f"{depth}.mp4"))
        saved = time.perf_counter() - start - decoded
    return {
        "decode_seconds": round(decoded, 2),
        "save_seconds": round(saved, 2),
        "main_memory_gb": round(memory.taken / 1e9, 2),
        "card_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "report": report,
    }


def cancel(node, vae, samples) -> dict:
    """Seconds from pressing Cancel to the end of the node, once in the middle stage or tiles of a running decode."""
    import comfy.model_management as management

    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.perf_counter())
        management.interrupt_current_processing(True)

    timer = threading.Timer(CANCEL_AFTER, press)
    timer.start()
    try:
        node.execute(samples, vae, 30.0)
    except management.InterruptProcessingException:
        torch.cuda.synchronize()
        return {"seconds": round(time.perf_counter() - pressed[0], 3)}
    finally:
        timer.cancel()
        management.interrupt_current_processing(False)
    return {"seconds": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=host_comfy.COMFYUI)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    options = parse_with_out(parser, card=True)
    pack = host_comfy.load(options.comfyui.resolve(), cpu=False)
    node = pack.nodes.vae_decode.T3VAEDecodeToVideo
    latents = random_latents("2.1", LATENT_FRAMES, 4 if options.tiny else 1)
    samples = {"samples": latents}
    results: dict = {"machine": machine(decode_4k.DEVICE) | {"command": " ".join(sys.argv)}}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        vae = decode_4k.host_vae(decode_4k.weights("2.1", False), torch.bfloat16)
        node.execute({"samples": latents[:, :, :2, :16, :16]}, vae, 30.0)  # kernels are compiled, libraries loaded
        rows = {"8 bits": 8, "10 bits, in a file": 10}
        for label, depth in rows.items():
            if depth == 10:
                buffer = f"{pack.__name__}.nodes.frame_buffer.free_main_memory"
                patches.enter_context(mock.patch(buffer, lambda: 10**9))
            results[label] = to_video(node, vae, samples, depth, Path(folder))
            print(label, json.dumps(results[label]), flush=True)
            save(options.out, results)
        patches.close()
        results["cancel"] = cancel(node, vae, samples)
        print("cancel", json.dumps(results["cancel"]), flush=True)
    save(options.out, results)


if __name__ == "__main__":
    main()
