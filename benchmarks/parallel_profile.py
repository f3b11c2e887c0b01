"""Where the time goes of a forward whose tokens are spread over several GPUs: each part of a block, on each rank.

    torchrun --nproc-per-node 2 benchmarks/parallel_profile.py --out parallel_profile_2.json

Five layers of the real sizes with random weights, one of each kind of windows, first whole on every rank, then spread
over all. The block's own code runs, with an event on the card before and after each part, so that parts add up to the
forward; the same forward without events says what those cost. `explained` compares what the parts lose (a rank's, less
its share of those of one rank) with what the forward loses. "exchange" holds the wait for the slower rank: the least
over ranks is the sending alone. `--tiny` tries it on CPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from keep import parse_with_out, save
from torch import nn

from t3 import block, chunks, diffusers_block, fused, memory
from t3.bench.machine import machine
from t3.bench.timing import release
from t3.bench.transformer import MODELS, SIZES, Transformer, grid_of, size_of
from t3.diffusers_text import TextAttention
from t3.parallel import sequence
from t3.parallel.faults import run
from t3.parallel.sequence import Spread
from t3.parallel.split import Split
from t3.parallel.spreading import Spreading
from t3.parallel.team import form_team
from t3.parallel.world import World
from t3.processor import install_t3, self_attentions

LAYERS = 5
OUTSIDE, OTHER = "outside the layers", "other"
PARTS = (
    "norms and sums",
    "q, k, v projections",
    "norm, RoPE, group or pack",
    "pack v",
    "exchange to heads",
    "group",
    "attention",
    "merge",
    "exchange back",
    "unpack",
    "output projection",
    "cross-attention",
    "feed-forward",
    OTHER,
    OUTSIDE,
)
# Nothing within these is told apart.
OPAQUE = ("pack v", "exchange to heads", "exchange back", "cross-attention", "feed-forward")


class Recorder:
    """Milliseconds of each part of each layer on this rank, by points in time between which one part runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.points: list[tuple[Any, int | None, str]] = []
        self.layer: int | None = None
        self._within: list[str] = []

    def _point(self) -> None:
        at: Any = time.perf_counter()
        if self.device.type == "cuda":
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self.points.append((at, self.layer, self.now))

    @property
    def now(self) -> str:
        """The part that runs."""
        return self._within[-1] if self._within else OTHER if self.layer is not None else OUTSIDE

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, that part runs."""
        if self.now in OPAQUE:
            yield
            return
        self._within.append(name)
        self._point()
        yield
        self._within.pop()
        self._point()

    @contextmanager
    def of_layer(self, number: int | None) -> Iterator[None]:
        """Within, that layer runs."""
        before, self.layer = self.layer, number
        self._point()
        yield
        self.layer = before
        self._point()

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """By layer, or `OUTSIDE`, and part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, dict[str, float]] = {}
        for (at, layer, name), (after, *_) in zip(self.points, self.points[1:], strict=False):
            ms = at.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - at)
            row = found.setdefault(OUTSIDE if layer is None else str(layer), {})
            row[name] = row.get(name, 0.0) + ms
        return found


def watched(recorder: Recorder, model: Any) -> ExitStack:
    """While it is open, `recorder` sees every part of the model's forward."""
    stack = ExitStack()
    outputs = {id(attention.to_out[0]) for attention, _ in self_attentions(model)}

    def wrap(owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        work = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with recorder.part(name if isinstance(name, str) else name(*args)):
                return work(*args, **kwargs)

        stack.enter_context(mock.patch.object(owner, attribute, timed))

    for module in (diffusers_block, block, sequence, fused):
        for attribute, name in {
            "add_norm": "norms and sums",
            "add_": "norms and sums",
            "feed_forward": "feed-forward",
            "window_group": "group",
            "window_merge": "merge",
            "window_merge_into": "merge",
            "attend_windows": "attention",
            "attend_heads": "attention",
        }.items():
            if attribute in vars(module):
                wrap(module, attribute, name)
    wrap(block, "window_group_into", "norm, RoPE, group or pack")
    wrap(sequence, "_project", "norm, RoPE, group or pack")
    layer = sequence._Layer
    wrap(layer, "pack", "pack v")
    wrap(layer, "send", "exchange to heads")
    wrap(layer, "_give_back", "exchange back")
    wrap(layer, "_receive", "exchange to heads")
    wrap(sequence, "window_group_into", lambda x, outs, rows, norm=None, *_: "unpack" if norm is None else recorder.now)
    wrap(sequence, "_wait", "exchange back")
    wrap(
        nn.Linear,
        "forward",
        lambda linear, *_: "output projection" if id(linear) in outputs else "q, k, v projections",
    )
    wrap(WanAttention, "forward", "cross-attention")
    for attribute in ("__init__", "__call__"):  # the keys, then each chunk
        wrap(TextAttention, attribute, "cross-attention")
    for number, some in enumerate(model.blocks):
        work = some.forward

        def of_layer(*args: Any, work: Any = work, number: int = number, **kwargs: Any) -> Any:
            with recorder.of_layer(number):
                return work(*args, **kwargs)

        stack.enter_context(mock.patch.object(some, "forward", of_layer))
    return stack


class Profile:
    """One run. Every rank goes through the same forwards; rank 0 keeps the rows."""

    def __init__(self, world: World, args: argparse.Namespace) -> None:
        self.world, self.args = world, args
        assert world.device is not None
        self.device = world.device
        about = {**machine(self.device), "ranks": world.size, "backend": world.backend}
        self.result: dict[str, Any] = {"machine": about, "rows": []}

    @torch.inference_mode()
    def measure(self) -> None:
        """Whole on each rank, then spread in every way that was asked for."""
        args, world = self.args, self.world
        transformer = Transformer(args.model, self.device, layers=LAYERS, tiny=args.tiny)
        model, shape = transformer.model, transformer.shape
        grid = grid_of(args.model, size_of(args.size, args.tiny), 9 if args.tiny else args.frames)
        install_t3(model, transformer.plan, memory="fast", say=world.say)
        generator = torch.Generator(self.device).manual_seed(1)
        options = {"generator": generator, "device": self.device, "dtype": transformer.dtype}
        latents = torch.randn(1, shape.in_channels, *(n * p for n, p in zip(grid, shape.patch, strict=True)), **options)
        text = torch.randn(1, shape.text_tokens, shape.text_dim, **options)
        timestep = torch.tensor([500.0], device=self.device)

        def forward() -> torch.Tensor:
            return model(latents, timestep, text, return_dict=False)[0]

        about = {"model": args.model, "grid": list(grid), "layers": LAYERS}
        partitions = [str(tuple(transformer.plan.partition(layer, grid))) for layer in range(LAYERS)]
        self.row({**about, "way": "one rank", "partitions": partitions}, forward, model)
        if world.size == 1 or shape.heads % world.size:
            return
        team = form_team(world, Split(1, 1, world.size))
        usual = Spread(team.sequence, team.part, world.size)
        processors = [attention.processor for attention, _ in self_attentions(model)]
        Spreading(model, usual)
        ways = [replace(usual, parts=parts) for parts in args.parts]
        ways += [replace(usual, groups=groups, parts=1) for groups in args.groups]
        for spread in ways:
            for processor in processors:
                processor.spread = spread
            way = f"{world.size} ranks, {spread.parts} parts, {spread.groups} groups"
            self.row({**about, "way": way, "parts": spread.parts, "groups": spread.groups}, forward, model)

    def row(self, about: dict[str, Any], forward: Callable[[], torch.Tensor], model: Any) -> None:
        """Time it without and with events; note all ranks' figures, and what is lost to one rank's share."""
        forward()
        plain = statistics.median(self._wall(forward) for _ in range(self.args.repeats))
        recorders, walls = [], []
        for _ in range(self.args.repeats):
            recorder = Recorder(self.device)
            with watched(recorder, model):
                walls.append(self._wall(lambda recorder=recorder: self._recorded(recorder, forward)))
            recorders.append(recorder.milliseconds())
        mine = {
            "plain_ms": 1e3 * plain,
            "with_events_ms": 1e3 * statistics.median(walls),
            "ms": _medians(recorders),
        }
        release(self.device)
        everyone = self.world.gather(_rounded(mine))
        row = about | {
            "plain_ms": max(other["plain_ms"] for other in everyone),
            "with_events_ms": max(other["with_events_ms"] for other in everyone),
            "of_each_rank": [other["ms"] for other in everyone],
        }
        rows = self.result["rows"]
        if rows:
            row |= _rounded(lost(rows[0], row, self.world.size))
        rows.append(row)
        if self.world.is_first:
            print(table(rows[0], row, self.world.size), flush=True)
            save(self.args.out, self.result)

    def _wall(self, work: Callable[[], Any]) -> float:
        if self.world.size > 1:
            torch.distributed.all_reduce(torch.ones(1, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def _recorded(self, recorder: Recorder, forward: Callable[[], Any]) -> None:
        with recorder.of_layer(None):
            forward()


def _medians(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        layer: {name: statistics.median(run[layer].get(name, 0.0) for run in runs) for name in parts}
        for layer, parts in runs[0].items()
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def mean_ms(row: dict[str, Any], layer: str, name: str) -> float:
    """Of a part, on average over ranks."""
    return statistics.fmean(rank.get(layer, {}).get(name, 0.0) for rank in row["of_each_rank"])


def lost(one: dict[str, Any], row: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Of each part, in ms of the five layers: what a rank spends beyond its share of one rank's; their sum, beside what
    the plain forward spends beyond its share."""
    layers = one["of_each_rank"][0]
    by_part = {
        name: sum(mean_ms(row, layer, name) - mean_ms(one, layer, name) / ranks for layer in layers) for name in PARTS
    }
    seen = row["plain_ms"] - one["plain_ms"] / ranks
    total = sum(by_part.values())
    explained = total / seen if seen else None
    return {"lost_ms": by_part, "lost_sum_ms": total, "lost_plain_ms": seen, "explained": explained}


def table(one: dict[str, Any], row: dict[str, Any], ranks: int) -> str:
    """One row as Markdown: of each part and layer the ranks' ms, and the share of one rank's in brackets."""
    layers = list(one["of_each_rank"][0])
    lines = [
        f"{row['model']}, {row['way']}: {row['plain_ms']:.1f} ms, with events {row['with_events_ms']:.1f} ms",
        "",
        f"| part | {' | '.join(layers)} | lost, ms |",
        "|" + "---|" * (len(layers) + 2),
    ]
    for name in PARTS:
        cells = []
        for layer in layers:
            each = [rank.get(layer, {}).get(name, 0.0) for rank in row["of_each_rank"]]
            share = mean_ms(one, layer, name) / ranks
            cells.append(f"{' '.join(f'{ms:.2f}' for ms in each)} ({share:.2f})" if any(each) or share else "")
        if any(cells):
            gone = f"{row['lost_ms'][name]:.2f}" if "lost_ms" in row else ""
            lines.append(f"| {name} | {' | '.join(cells)} | {gone} |")
    if "lost_ms" in row:
        explained = "" if row["explained"] is None else f" ({100 * row['explained']:.0f} %)"
        lines += ["", f"lost: {row['lost_sum_ms']:.1f} ms by parts of {row['lost_plain_ms']:.1f} ms{explained}"]
    return "\n".join([*lines, ""])


def _measure(world: World, args: argparse.Namespace) -> int:
    if args.tiny:
        # So that tokens go by chunks, as they do at real sizes.
        memory.CHUNK_BYTES, chunks.TILE = 256 * 4 * 64, 16
    if world.size == 1:
        world.device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    world.start("cpu" if args.tiny else "auto")
    Profile(world, args).measure()
    world.close()
    return 0


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.3b", choices=MODELS)
    parser.add_argument("--size", default="4k", choices=SIZES)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=2, help="timed forwards of each way, without events and with")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8], help="runs of tokens on their way")
    parser.add_argument("--groups", type=int, nargs="*", default=[2], help="groups of heads, where memory is short")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    args = parse_with_out(parser)
    return run("parallel_profile", lambda world: _measure(world, args), as_json=False)


if __name__ == "__main__":
    sys.exit(main())
