"""Time `t3.generate` and `t3.decode` on models of the real sizes with random weights.

    python benchmarks/headless_4k.py --models 1.3b 5b --out results.json

Speed and memory do not depend on what the weights are, so they are drawn at random; the text encoder is one small
layer, since it runs once. Each row is the command line a user would type, run in this process. Each forward pass of the
transformer is timed between two synchronisations of the card; a row gives the first (which warms up or compiles) and
the median of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from keep import parse_with_out, save
from transformers import UMT5Config, UMT5EncoderModel

from t3 import __version__, decode, generate
from t3.weights.catalogue import known_config
from tools.small_model.text import make_tokenizer

MODELS = {
    "1.3b": ("wan2.1-t2v-1.3b", "wan2.1-vae"),
    "5b": ("wan2.2-ti2v-5b", "wan2.2-vae"),
    "14b": ("wan2.1-t2v-14b", "wan2.1-vae"),
}
SAMPLING = {
    "1.3b": {
        "as it comes": [],
        "compile": ["--compile"],
        "dtype fp8": ["--dtype", "fp8"],
        "offload model": ["--offload", "model"],
        "offload group": ["--offload", "group"],
        "memory lean": ["--memory", "lean"],
    },
    "5b": {
        "as it comes": [],
        "compile": ["--compile"],
        "offload group": ["--offload", "group"],
        "memory lean": ["--memory", "lean"],
    },
    "14b": {"as it comes": []},
}
TINY = {"num_layers": 5, "num_attention_heads": 2, "ffn_dim": 256}


def build(folder: Path, model: str, device: str, tiny: bool) -> None:
    """Write a diffusers folder of this model's shapes with random weights in bfloat16."""
    transformer_name, vae_name = MODELS[model]
    transformer_config = {**known_config(transformer_name), **(TINY if tiny else {})}
    vae_config = {**known_config(vae_name), **({"base_dim": 8, "decoder_base_dim": None} if tiny else {})}
    text = {"d_model": 4096, "d_kv": 64, "d_ff": 256, "num_layers": 1, "num_heads": 2}
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    with torch.device(device):
        transformer = WanTransformer3DModel(**transformer_config).bfloat16()
        vae = AutoencoderKLWan(**vae_config).bfloat16()
        encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **text)).bfloat16()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    ).save_pretrained(folder)


@contextlib.contextmanager
def timed_forwards():
    """Within it, seconds of every forward pass of a transformer are added to the list it gives."""
    seconds: list[float] = []
    plain = WanTransformer3DModel.forward

    def forward(self, *args, **kwargs):
        synchronize()
        start = time.perf_counter()
        out = plain(self, *args, **kwargs)
        synchronize()
        seconds.append(time.perf_counter() - start)
        return out

    WanTransformer3DModel.forward = forward
    try:
        yield seconds
    finally:
        WanTransformer3DModel.forward = plain


def synchronize() -> None:
    """Wait for the card, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(command, arguments: list[str]) -> dict:
    """Run one command line; its JSON result, peak memory of the card, and seconds of each forward pass."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    printed = io.StringIO()
    start = time.perf_counter()
    with timed_forwards() as forwards, contextlib.redirect_stdout(printed):
        status = command([*arguments, "--json"])
    wall = time.perf_counter() - start
    result = json.loads(printed.getvalue())
    row = {"command": arguments, "status": status, "wall_seconds": round(wall, 2), "seconds": result.get("seconds")}
    if status:
        row["error"] = result.get("error") or [clip.get("error") for clip in result.get("clips", [])]
    if forwards:
        row["first_forward"] = round(forwards[0], 3)
        row["forward"] = round(statistics.median(forwards[1:] or forwards), 3)
    if torch.cuda.is_available():
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if "memory_bytes" in result:
        row["estimate_gib"] = {k: round(v / 2**30, 2) for k, v in result["memory_bytes"].items() if k != "dtype"}
        row["backend"] = result.get("backend", {}).get("name")
    return row


def machine() -> dict:
    """What the figures depend on."""
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "device": card.name if card else "CPU",
        "memory_gib": round(card.total_memory / 2**30, 1) if card else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": diffusers.__version__,
        "t3": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
    }


def main() -> None:
    """Run the rows, writing what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.3b", "5b"])
    names = dict.fromkeys(name for rows in SAMPLING.values() for name in rows)
    parser.add_argument("--rows", nargs="+", choices=names, help="sampling rows, by name (default: all)")
    parser.add_argument("--forwards", type=int, default=3)
    parser.add_argument("--no-video", action="store_true", help="leave out decode and the whole run")
    parser.add_argument("--tiny", action="store_true", help="tiny models and clips: try the script on a CPU")
    args = parse_with_out(parser, required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = ["--height", "64", "--width", "96", "--frames", "5"] if args.tiny else []
    crop = ["--crop", "60"] if args.tiny else ["--crop", "2160"]
    results = {"machine": machine(), "rows": {}}

    def add(name: str, row: dict) -> None:
        row["command"] = " ".join(row["command"]).replace(temporary, "...")
        results["rows"][name] = row
        save(args.out, results)
        print(name, {k: v for k, v in row.items() if k != "command"}, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            folder = Path(temporary) / model
            build(folder, model, device, args.tiny)
            gc.collect()
            common = ["--model", str(folder), "--prompt", "a boat", *size]
            latents = Path(temporary) / f"{model}.latent"
            for name, extra in SAMPLING[model].items():
                if args.rows and name not in args.rows:
                    continue
                steps = ["--steps", str(args.forwards), "--cfg", "1"]
                keep = ["--no-decode", "--latents-out", str(latents), "--overwrite"]
                add(f"{model}, {name}", run(generate.main, [*common, *steps, *keep, *extra]))
            if args.no_video:
                continue
            clip = [str(latents), "--vae", str(folder), "--out", str(Path(temporary) / f"{model}-decoded.mp4"), *crop]
            add(f"{model}, decode", run(decode.main, clip))
            whole = ["--steps", "2", "--out", str(Path(temporary) / f"{model}.mp4"), *crop]
            add(f"{model}, whole", run(generate.main, [*common, *whole]))


if __name__ == "__main__":
    main()
