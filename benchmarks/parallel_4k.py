"""Time a forward pass at 4K over several GPUs: by sequence, by guidance, and what is sent between them alone.

    torchrun --nproc-per-node 2 benchmarks/parallel_4k.py --out results.json

Models of the real sizes with random weights; the same run measures one GPU alone, and what the ranks' results differ
from its. What tells most comes first, and each row is written as soon as it is there. `--tiny` tries all of it on a
CPU. `parallel_profile.py` tells where the time goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from keep import parse_with_out, save

from t3.bench.machine import machine
from t3.bench.timing import release
from t3.bench.transformer import MODELS, SIZES, Transformer, grid_of, size_of
from t3.memory import GIB
from t3.parallel import sequence
from t3.parallel.faults import run
from t3.parallel.guidance import GuidanceSplit
from t3.parallel.sequence import Spread
from t3.parallel.split import Split
from t3.parallel.spreading import Spreading
from t3.parallel.team import Team, form_team
from t3.parallel.world import World
from t3.processor import T3AttentionProcessor, install_t3, self_attentions

# A rank that fails alone leaves the others waiting in a collective: that ends the run, the rows so far are kept.
PATIENCE = 120.0


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1.3b", "5b"], choices=MODELS)
    parser.add_argument("--size", default="4k", choices=SIZES)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each row, after one that is not counted")
    ways = list(dict.fromkeys([sequence.PARTS, 1, 2, 4]))
    parser.add_argument("--parts", type=int, nargs="+", default=ways, help="runs of tokens on their way")
    parser.add_argument(
        "--groups", type=int, nargs="*", default=[2, 6], help="groups of heads, as if memory were short"
    )
    parser.add_argument("--memory", default="auto", help="as for install_t3: auto, fast, lean")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="begin no row that would end later, were it the longest",
    )
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    args = parse_with_out(parser)
    return run("parallel_4k", lambda world: _measure(world, args), as_json=False)


def _measure(world: World, args: argparse.Namespace) -> int:
    if world.size == 1:
        world.device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    world.start("cpu" if args.tiny else "auto")
    bench = Bench(world, args)
    for name in args.models:
        bench.model(name)
    if world.is_first:
        print(table(bench.result))
    world.close()
    return 0


class Bench:
    """Rows of one run. Every rank goes through the same ones; rank 0 keeps the results."""

    def __init__(self, world: World, args: argparse.Namespace) -> None:
        self.world, self.args = world, args
        assert world.device is not None
        self.device = world.device
        # When this began, and how long the longest row took.
        self._began, self._longest = time.monotonic(), 0.0
        self.result: dict[str, Any] = {
            "machine": {**machine(self.device), "ranks": world.size, "backend": world.backend},
            "rows": [],
        }

    @torch.inference_mode()
    def model(self, name: str) -> None:
        """All rows of one model."""
        args, world = self.args, self.world
        transformer = Transformer(name, self.device, tiny=args.tiny)
        frames = 9 if args.tiny else args.frames
        grid = grid_of(name, size_of(args.size, args.tiny), frames)
        inputs = _inputs(transformer, grid)
        model = transformer.model
        installed = install_t3(model, transformer.plan, memory=args.memory, say=world.say)
        common = {"model": name, "grid": list(grid), "tokens": grid.tokens, "layers": transformer.shape.layers}
        expected: list[torch.Tensor] = []

        def alone() -> torch.Tensor:
            return model(**inputs)[0]

        def pair() -> torch.Tensor:
            with model.cache_context("cond"):
                first = model(**inputs)[0]
            with model.cache_context("uncond"):
                model(**inputs)
            return first

        def keep() -> torch.Tensor:
            expected[:] = [alone()]
            return expected[0]

        self.row({**common, "case": "alone", "split": asdict(Split()), "note": "each rank the same, whole"}, keep)
        heads = transformer.shape.heads
        if world.size > 1 and heads % world.size == 0:
            split = Split(1, 1, world.size)
            team = form_team(world, split)
            undo = self._spread(model, team)
            about = {**common, "case": "sequence", "split": asdict(split)}
            usual = _spread_of(model)

            def spread_rows(ways: list[Spread]) -> None:
                for spread in ways:
                    _set_spread(model, spread)
                    self.row({**about, "parts": spread.parts, "groups": spread.groups}, alone, expected)

            spread_rows([replace(usual, parts=parts) for parts in args.parts])
            self.exchange({**common, "split": asdict(split)}, transformer, usual, grid.tokens)
            spread_rows([replace(usual, parts=1, groups=groups) for groups in args.groups])
            _set_spread(model, usual)
            for step in reversed(undo):
                step()
        if world.size % 2 == 0 and heads % (world.size // 2) == 0:
            split = Split(1, 2, world.size // 2)
            team = form_team(world, split)
            undo = self._spread(model, team) if split.sequence > 1 else []
            undo.append(GuidanceSplit(model, team.guidance, team.prediction).remove)
            note = "both predictions of a step; twice `alone` on one GPU"
            self.row({**common, "case": "guidance", "split": asdict(split), "note": note}, pair, expected, passes=2)
            for step in reversed(undo):
                step()
        installed.remove()
        expected.clear()
        transformer.remove()

    def _spread(self, model: Any, team: Team) -> list[Callable[[], None]]:
        spread = Spread(team.sequence, team.part, team.split.sequence)
        _set_spread(model, spread)
        spreading = Spreading(model, spread)
        return [lambda: _set_spread(model, None), spreading.remove]

    def exchange(self, about: dict[str, Any], transformer: Transformer, spread: Spread, tokens: int) -> None:
        """Rows of what one layer sends, alone and of all heads at once: one tensor, as the result that goes back, and
        three, as q, k and v; and one by torch's all-to-all, which sends a rank's own to itself as well."""
        shares, heads = spread.shares(tokens), transformer.shape.heads
        own, width, ranks = shares[spread.rank], transformer.shape.dim, range(spread.size)
        options = {"device": self.device, "dtype": transformer.dtype}
        packed = torch.randn(3, spread.size, own, width // spread.size, **options)
        received = torch.empty(3, tokens, width // spread.size, **options)
        sent = packed[0].numel() * packed.element_size() * (spread.size - 1) // spread.size
        about = {**about, "heads": heads}
        for count in (1, 3):
            give = [[x[rank] for x in packed[:count]] for rank in ranks]
            take = [[x.split(shares)[rank] for x in received[:count]] for rank in ranks]

            def swap(give: Any = give, take: Any = take) -> torch.Tensor:
                sequence._wait(sequence._swap(give, take, spread))
                return received

            self.row({**about, "bytes_sent": count * sent, "case": "exchange", "tensors": count}, swap)

        def all_to_all() -> torch.Tensor:
            sizes = [own] * spread.size
            torch.distributed.all_to_all_single(received[0], packed[0].flatten(0, 1), shares, sizes, group=spread.group)
            return received

        self.row({**about, "bytes_sent": sent, "case": "all-to-all", "tensors": 1}, all_to_all)

    def row(
        self,
        about: dict[str, Any],
        work: Callable[[], torch.Tensor],
        expected: list[torch.Tensor] | None = None,
        passes: int = 1,
    ) -> None:
        """Run it, and keep seconds of the slowest rank, peaks of all, and the error to `expected`."""
        found: dict[str, Any]
        began = time.monotonic()
        if not self._in_time():
            self.world.say(f"{about['model']}: no time for {about['case']}")
            self.result["left_out"] = self.result.get("left_out", 0) + 1
            self._write()
            return
        try:
            found = self._timed(work, expected)
        except Exception as error:  # one row less
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        release(self.device)
        everyone = self.world.gather(found, PATIENCE)
        row = about | {"ranks": self.world.size}
        failed = [f"rank {rank}: {other['error']}" for rank, other in enumerate(everyone) if "error" in other]
        if failed:
            row["failed"] = "; ".join(failed)
        else:
            runs = [max(times) for times in zip(*(other["seconds"] for other in everyone), strict=True)]
            row |= {"seconds": statistics.median(runs), "runs": runs, "passes": passes}
            row["peak_bytes"] = [other["peak"] for other in everyone]
            if "differs" in everyone[0]:
                row["differs"] = {key: max(other["differs"][key] for other in everyone) for key in ("rms", "largest")}
            base = next((r for r in self.result["rows"] if r["model"] == row["model"] and r["case"] == "alone"), None)
            if base and "seconds" in base and row["case"] in ("sequence", "guidance"):
                row["speed_up"] = passes * base["seconds"] / row["seconds"]
            if "bytes_sent" in row:
                row["gb_per_s"] = row["bytes_sent"] / row["seconds"] / 1e9
        self.result["rows"].append(row)
        self._longest = max(self._longest, time.monotonic() - began)
        self.world.say(line(row))
        self._write()

    def _in_time(self) -> bool:
        """Whether one more row is to be begun: the same on every rank."""
        if self.args.seconds is None:
            return True
        end = time.monotonic() - self._began + self._longest
        return max(self.world.gather(end, PATIENCE)) <= self.args.seconds

    def _write(self) -> None:
        if self.world.is_first:
            save(self.args.out, self.result)

    def _timed(self, work: Callable[[], torch.Tensor], expected: list[torch.Tensor] | None) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        release(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        found: dict[str, Any] = {"seconds": []}
        out = work()
        if expected:
            found["differs"] = _differs(out, expected[0])
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else 0
        del out
        for _ in range(self.args.repeats):
            self._together()
            begin = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize(self.device)
            found["seconds"].append(time.perf_counter() - begin)
        found["peak"] = peak
        return found

    def _together(self) -> None:
        """All ranks begin at once, with nothing left to do on their cards."""
        if self.world.size > 1:
            torch.distributed.all_reduce(torch.ones(1, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _inputs(transformer: Transformer, grid: Any) -> dict[str, Any]:
    """Random latents, batch 1, and text of full length: the same on every rank."""
    frames, height, width = (n * p for n, p in zip(grid, transformer.shape.patch, strict=True))
    generator = torch.Generator().manual_seed(1)
    shape = transformer.shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(transformer.device, transformer.dtype)

    return {
        "hidden_states": random(1, shape.in_channels, frames, height, width),
        "timestep": torch.tensor([500.0], device=transformer.device),
        "encoder_hidden_states": random(1, shape.text_tokens, shape.text_dim),
        "return_dict": False,
    }


def _processors(model: Any) -> list[T3AttentionProcessor]:
    return [attention.processor for attention, _ in self_attentions(model)]


def _spread_of(model: Any) -> Spread:
    spread = _processors(model)[0].spread
    assert spread is not None
    return spread


def _set_spread(model: Any, spread: Spread | None) -> None:
    for processor in _processors(model):
        processor.spread = spread


def _differs(out: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Root of the mean square and largest of the difference, as parts of those of what is expected."""
    a, b = out.double(), expected.double()
    return {
        "rms": float((a - b).square().mean().sqrt() / b.square().mean().sqrt()),
        "largest": float((a - b).abs().max() / b.abs().max()),
    }


def line(row: dict[str, Any]) -> str:
    """A row for people, as it comes."""
    split = str(Split(**row["split"]))
    how = f", {_way(row)}" if "groups" in row else ""
    text = f"{row['model']}: {row['case']}, {split}{how}: "
    if "failed" in row:
        return text + row["failed"]
    text += f"{row['seconds']:.4g} s"
    if "speed_up" in row:
        text += f", {row['speed_up']:.3f} times one GPU"
    if "gb_per_s" in row:
        text += f", {row['gb_per_s']:.4g} GB/s sent by a rank"
    if any(row["peak_bytes"]):
        text += f", peak {max(row['peak_bytes']) / GIB:.1f} GiB"
    if "differs" in row:
        text += f", differs by {row['differs']['rms']:.2g} (rms), {row['differs']['largest']:.2g} (largest)"
    return text


def _way(row: dict[str, Any]) -> str:
    return f"tokens in {row['parts']}, heads in {row['groups']}"


def table(result: dict[str, Any]) -> str:
    """Markdown of everything measured."""
    head = " | ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        head,
        "",
        "| model | case | split | exchange | s | speed-up | peak a rank, GiB | rms error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        how = ""
        if "groups" in row:
            how = _way(row)
        if "gb_per_s" in row:
            how = f"{row['tensors']} tensors, {row['bytes_sent'] / 1e9:.3g} GB, {row['gb_per_s']:.4g} GB/s"
        seconds = "failed" if "failed" in row else f"{row['seconds']:.4g}"
        speed = f"{row['speed_up']:.2f}" if "speed_up" in row else ""
        peak = f"{max(row['peak_bytes']) / GIB:.1f}" if any(row.get("peak_bytes", [])) else ""
        error = f"{row['differs']['rms']:.1e}" if "differs" in row else ""
        cells = [row["model"], row["case"], str(Split(**row["split"])), how, seconds, speed, peak, error]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
