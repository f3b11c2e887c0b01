"""Time the decode of a 4K clip on one GPU and shared over all of them, in one run.

    torchrun --nproc-per-node 2 benchmarks/parallel_decode.py --vaes 2.1 2.2 --out parallel_decode_2.json

For each VAE, rows on rank 0 alone (with the tile that is best for one, and with that of the shared decode), then rows
of all ranks: seconds, speed-up over one rank's best, the most memory of each rank, and whether the pixels are equal bit
for bit to those of one rank with the same tiles. Then an encode of the clip, likewise. Weights are random, of the real
sizes. A table is printed, and the JSON is written after every row. `--tiny` tries it on CPUs with gloo.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from keep import parse_with_out, save
from most import Most

from t3.bench.decode import VAES, random_vae
from t3.bench.machine import machine
from t3.parallel import faults
from t3.parallel.world import World
from t3.vae import WanDecoder, WanEncoder, decode_frames, encode_frames
from t3.vae.ranks import Ranks
from t3.vae.shared_decode import decode_shared
from t3.vae.shared_encode import encode_shared

GIB = 2**30


def resident() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def measured(work: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    """What the work gives; its seconds, and the most memory meanwhile."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with Most(resident, 0.02) as host:
        begin = time.perf_counter()
        found = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    row = {"seconds": seconds, "host_gib": host.taken / GIB}
    if device.type == "cuda":
        row |= {
            "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "held_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return found, row


class Run:
    """The rows of one run, on this rank; rank 0's are written."""

    def __init__(self, world: World, ranks: Ranks, out: Path | None, repeats: int) -> None:
        assert world.device is not None
        self.device, self.ranks, self.out, self.repeats = world.device, ranks, out, repeats
        about = machine(self.device) if ranks.first else {}
        self.results: dict[str, Any] = {"machine": about | {"command": " ".join(sys.argv[1:])}, "ranks": ranks.size}
        self.results["rows"] = []

    def alone(self, case: str, row: str, work: Callable[[], Any]) -> Any:
        """A row of rank 0 alone; the others wait."""
        found, failed = None, None
        if self.ranks.first:
            try:
                found, figures = self._median(work)
                self._add(case, row, [figures], {})
            except Exception as error:
                failed = self._failed(case, row, error)
        self.ranks.words(failed)
        return found

    def together(self, case: str, row: str, work: Callable[[dict], Any], check: Callable[[Any], dict]) -> None:
        """A row of all ranks. A fault on one rank ends the run: the others cannot go on."""
        report: dict[str, Any] = {}
        self.ranks.meet()
        found, figures = self._median(lambda: work(report), self.ranks.meet)
        everyone = self.ranks.words(figures | report)
        if self.ranks.first:
            self._add(case, row, everyone, check(found))

    def _median(self, work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> tuple[Any, dict]:
        """The last result, with the median of seconds and the most of memory over the repeats."""
        rows, found = [], None
        for _ in range(self.repeats):
            del found
            before()
            found, row = measured(work, self.device)
            rows.append(row)
        figures = {name: max(row[name] for row in rows) for name in rows[0]}
        return found, figures | {"seconds": statistics.median(row["seconds"] for row in rows)}

    def _add(self, case: str, row: str, everyone: list[dict], more: dict) -> None:
        first = {"case": case, "row": row, "ranks": len(everyone), "seconds": everyone[0]["seconds"]}
        before = [old for old in self.results["rows"] if old["case"] == case and old["ranks"] == 1]
        if len(everyone) > 1 and before:
            first["speedup"] = min(old["seconds"] for old in before) / first["seconds"]
        self.results["rows"].append(rounded(first | more | {"of_each_rank": everyone}))
        self._write()

    def _failed(self, case: str, row: str, error: Exception) -> str:
        traceback.print_exception(error)
        failed = f"{type(error).__name__}: {str(error)[:300]}"
        self.results["rows"].append({"case": case, "row": row, "failed": failed})
        self._write()
        return failed

    def _write(self) -> None:
        print(json.dumps(self.results["rows"][-1]), flush=True)
        save(self.out, self.results)

    def table(self) -> str:
        """The rows as Markdown."""
        lines = [
            "| case | row | ranks | s | speed-up | peak GiB of each rank | equal |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.results["rows"]:
            peaks = ", ".join(f"{own['peak_gib']:.1f}" for own in row.get("of_each_rank", []) if "peak_gib" in own)
            speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
            figures = [row["case"], row["row"], row.get("ranks", ""), row.get("seconds", row.get("failed", ""))]
            lines.append("| " + " | ".join(map(str, [*figures, speedup, peaks, row.get("bit_equal", "")])) + " |")
        return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Floats to four digits, wherever they are."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def decode_rows(run: Run, name: str, frames: int, tiny: bool) -> None:
    """A clip of `frames` latent frames decoded to 8 bits."""
    case, device, ranks = f"decode {name}", run.device, run.ranks
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    decoder = WanDecoder.from_state_dict(random_vae(name, tiny), device, dtype)
    _, (channels, height, width) = VAES[name]
    cut = 16 if tiny else 1
    shape = (1, channels, frames, height // cut, width // cut)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale = decoder.structure.scale
    pixels = (1, decoder.structure.frames(frames), shape[3] * scale, shape[4] * scale, 3)

    def room() -> torch.Tensor:
        return torch.empty(pixels, dtype=torch.uint8)

    warm: dict[str, Any] = {}
    small = latents[..., : 8 * ranks.size, : 8 * ranks.size]
    decode_shared(decoder, small, ranks, report=warm)
    run.alone(case, "one rank, its best tile", lambda: decode_frames(decoder, latents, out=room(), say=print))
    seen: dict[str, Any] = {}

    def shared(report: dict) -> torch.Tensor | None:
        found = decode_shared(decoder, latents, ranks, out=room() if ranks.first else None, say=print, report=report)
        seen.update(report)
        return found

    kept: list[torch.Tensor] = []
    run.together(case, "all ranks", shared, lambda found: kept.append(found) or {"pixels": list(pixels)})
    tile = tuple(ranks.words(seen.get("tile"))[0])
    truth = run.alone(
        case, "one rank, the same tile", lambda: decode_frames(decoder, latents, out=room(), tile=tile, say=print)
    )
    if ranks.first and truth is not None and kept:
        compare(run, case, kept[0], truth)


def encode_rows(run: Run, name: str, frames: int, tiny: bool) -> None:
    """The same clip's size encoded, from 8 bits."""
    case, device, ranks = f"encode {name}", run.device, run.ranks
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = WanEncoder.from_state_dict(random_vae(name, tiny), device, dtype)
    _, (_, height, width) = VAES[name]
    scale, cut = encoder.structure.scale, 16 if tiny else 1
    size = (1, 1 + encoder.structure.step * (frames - 1), height // cut * scale, width // cut * scale, 3)
    # Drawn on the card, which takes a second where a CPU takes half a minute; the same on every rank.
    source = torch.Generator(device).manual_seed(2)
    clip = torch.randint(256, size, generator=source, dtype=torch.uint8, device=device).cpu()
    encode_shared(encoder, clip[:, :5, : 8 * scale, : 8 * scale], ranks)
    run.alone(case, "one rank, its best tile", lambda: encode_frames(encoder, clip, say=print))
    seen: dict[str, Any] = {}

    def shared(report: dict) -> torch.Tensor:
        found = encode_shared(encoder, clip, ranks, say=print, report=report)
        seen.update(report)
        return found

    kept: list[torch.Tensor] = []
    run.together(case, "all ranks", shared, lambda found: kept.append(found) or {})
    tile = tuple(ranks.words(seen.get("tile"))[0])
    truth = run.alone(case, "one rank, the same tile", lambda: encode_frames(encoder, clip, tile=tile, say=print))
    if ranks.first and truth is not None and kept:
        compare(run, case, kept[0], truth)


def compare(run: Run, case: str, found: torch.Tensor, truth: torch.Tensor) -> None:
    """Note in the row of all ranks whether it is the result of one rank."""
    row = next(row for row in run.results["rows"] if row["case"] == case and row["row"] == "all ranks")
    row["bit_equal"] = torch.equal(found, truth)
    if not row["bit_equal"]:
        # Frame by frame: as floats a whole clip is 8 GB.
        pairs = zip(found[0], truth[0], strict=True)
        worst = [((a.float() - b.float()).abs().max().item(), (a != b).sum().item()) for a, b in pairs]
        row["largest_difference"] = max(most for most, _ in worst)
        row["differing_share"] = sum(count for _, count in worst) / found.numel()
    run._write()


def benchmark(args: argparse.Namespace, world: World) -> int:
    """All rows; a case that fails on all ranks alike does not keep the next from being measured."""
    if world.size == 1:
        sys.exit("start this with torchrun, on two processes or more: torchrun --nproc-per-node 2 " + sys.argv[0])
    world.start("cpu" if args.cpu else "auto")
    if world.device is not None and world.device.type == "cpu":
        torch.set_num_threads(1)
    run = Run(world, Ranks(), args.out, args.repeats)
    latent_frames = 1 + (args.frames - 1) // 4
    for name in args.vaes:
        for rows in (decode_rows, encode_rows) if args.encode else (decode_rows,):
            try:
                rows(run, name, latent_frames, args.tiny)
            except ValueError as error:  # T3Error, which all ranks raise together
                if world.is_first:
                    run._failed(f"{rows.__name__} {name}", "all ranks", error)
            gc.collect()
    if world.is_first:
        print(run.table(), flush=True)
    return 0


def main() -> int:
    """Run under torchrun; returns the exit status of this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vaes", nargs="+", choices=VAES, default=list(VAES))
    parser.add_argument("--frames", type=int, default=81, help="4n+1 (default: 81)")
    parser.add_argument("--repeats", type=int, default=1, help="of each row; seconds are the median (default: 1)")
    parser.add_argument("--no-encode", dest="encode", action="store_false", help="leave out the encode")
    parser.add_argument("--cpu", action="store_true", help="gloo on CPUs, even where there are cards")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    args = parse_with_out(parser)
    return faults.run("parallel_decode", lambda world: benchmark(args, world), as_json=False)


if __name__ == "__main__":
    sys.exit(main())
