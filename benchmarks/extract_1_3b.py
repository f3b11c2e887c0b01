"""Time `t3.extract` on two files of Wan2.1 1.3B's size, and tell its peaks of memory and what it wrote.

    python benchmarks/extract_1_3b.py --device cuda --out results.json
    python benchmarks/extract_1_3b.py --device cpu --cases "--rank 64"

Each case is a set of options of `t3.extract`, run in a process of its own. The files (2 x 2.8 GB, bfloat16, random) are
made in a temporary folder and removed at the end. What tuning changed is a product of 384 columns whose sizes fall as
1/sqrt(i), 5 % of the weights in all, rounded to bfloat16 with them: neither of low rank nor noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from keep import parse_with_out, save

from t3.weights import known_config
from t3.weights.layout_dit import dit_layout
from t3.weights.write import Entry, tensor_bytes, write_safetensors

CASES = ("--rank auto", "--rank auto --max-rank 64", "--rank 64")
COLUMNS, SCALE, CHANGE = 384, 0.03, 0.05
RUN = """
import json, sys, time
from t3 import cli, extract
start = time.perf_counter()
status = extract.main(sys.argv[1:])
times = {"wall": time.perf_counter() - start, "cpu": time.process_time()}
print("PEAK " + json.dumps({"status": status, **times, **cli.peak_memory()}))
"""


def tensor(name: str, shape: tuple[int, ...], tuned: bool, device: str) -> torch.Tensor:
    """A parameter of one of the two models; the same for the same name."""
    random = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=random, device=device)

    weight = noise(*shape) * SCALE
    if tuned:
        rows, columns = shape[0], weight.numel() // shape[0]
        count = min(COLUMNS, rows, columns)
        sizes = torch.arange(1, count + 1, device=device) ** -0.5
        change = (noise(rows, count) * sizes @ noise(count, columns)).reshape(shape)
        weight = weight + change * (CHANGE * weight.norm() / change.norm())
    return weight.bfloat16()


def make(path: Path, tuned: bool, device: str) -> Path:
    """Write a whole model, one tensor at a time."""

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        yield tensor_bytes(tensor(name, shape, tuned, device))

    layout = dit_layout(known_config("wan2.1-t2v-1.3b"))
    entries = [
        Entry(name, "BF16", param.shape, lambda name=name, shape=param.shape: pieces(name, shape))
        for name, param in layout.items()
    ]
    return write_safetensors(path, entries, {})


def measure(case: str, base: Path, tuned: Path, device: str) -> dict:
    """Seconds, peaks and results of one extraction."""
    out = base.parent / "lora.safetensors"
    options = [str(base), str(tuned), "--out", str(out), "--device", device, "--json", *case.split()]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", RUN, *options], cwd=root, stdout=subprocess.PIPE, text=True)
    text, _, last = done.stdout.rpartition("PEAK ")
    peak = json.loads(last)
    if peak["status"]:
        raise SystemExit(f"{case}: exit status {peak['status']}")
    result = json.loads(text)
    out.unlink()
    loras = sorted(change["rank"] for change in result["changes"] if change["rank"])
    return {
        "case": case,
        "seconds": round(result["seconds"], 1),
        "seconds_with_start": round(peak["wall"], 1),
        "cpu_seconds": round(peak["cpu"], 1),
        "host_gib": round(peak["host"] / 2**30, 2),
        "device_gib": round(peak.get("device", 0) / 2**30, 2),
        "error": round(result["error"], 4),
        "loras": len(loras),
        "median_rank": loras[len(loras) // 2] if loras else 0,
        "mib": round(result["bytes"] / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", default=CASES, help="options of t3.extract, each set in quotes")
    parser.add_argument("--folder", type=Path, help="where the two files are made (6 GB, default: the system's)")
    args = parse_with_out(parser)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    figures = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start = time.perf_counter()
        base, tuned = (make(Path(folder) / f"{n}.safetensors", n == "tuned", args.device) for n in ("base", "tuned"))
        print(f"{name}, torch {torch.__version__}; two files made in {time.perf_counter() - start:.0f} s", flush=True)
        for case in args.cases:
            figures.append(measure(case, base, tuned, args.device))
            print(json.dumps(figures[-1]), flush=True)
            save(args.out, {"device": name, "torch": torch.__version__, "figures": figures})


if __name__ == "__main__":
    main()
