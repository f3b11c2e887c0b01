"""Time what stands beside self-attention in a Wan block, on one GPU: norms, gated sums, the feed-forward layer,
cross-attention by each exact kernel; and two questions about attention itself, the layout of the windows and the kind
of numbers in them.

    python benchmarks/block_parts.py --out results.json
    python benchmarks/block_parts.py --only cross

Needs torch and Triton. Random data in the shapes of the released models at 4K, bfloat16. Times are for all tokens,
worked off in chunks of the given number; those of the feed-forward layer hold one copy of its result. "host": ComfyUI's
own expressions. Errors are relative to float64, on 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from keep import parse_with_out, save
from torch import nn

from t3 import Grid, Plan
from t3.backends import BACKENDS, Backend, Situation
from t3.bench.machine import machine, measure_ceilings, pick_device
from t3.bench.timing import milliseconds as timed_ms
from t3.feed_forward import feed_forward, legal
from t3.kernels.add_norm import kernel
from t3.kernels.add_norm.op import add_, add_norm
from t3.kernels.window_group.op import window_group

DEVICE = pick_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
EPS = 1e-6
WAN21, LAYERS = Plan.preset("wan2.1-4k"), 5
SAMPLE = 512
TEXT, IMAGE = 512, 257  # tokens of a text, as Wan pads it, and of an image
WARPS = (2, 4, 8)  # of a program


@dataclass(frozen=True)
class Shape:
    """One model at 4K."""

    name: str
    tokens: int
    width: int
    hidden: int
    chunks: tuple[int, ...]


K = 1024
SHAPES = [
    Shape("1.3B 4K", 21 * 136 * 240, 1536, 8960, (8 * K, 16 * K, 32 * K, 64 * K, 21 * 136 * 240)),
    Shape("5B 4K", 21 * 68 * 120, 3072, 14336, (8 * K, 16 * K, 32 * K, 64 * K, 21 * 68 * 120)),
]
TINY = [Shape("tiny", 700, 96, 200, (64, 700))]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)


def off(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float(f"{((out.double() - exact).norm() / exact.norm()).item():.3g}")


# Norms and sums


def norm_rows(shape: Shape, copy_rate: float) -> dict:
    """`[ms, GB/s, percent of the copy rate]` by task, way and chunk. GB/s of the bytes that have to be moved."""
    x, update = random(1, shape.tokens, shape.width), random(1, shape.tokens, shape.width, seed=1)
    # As the chunks of a modulation table; the gate small, since x is added to many times.
    e = random(1, 6, shape.width, seed=2)
    gate, scale, shift = (part.squeeze(1)[:, None] for part in (e[:, 0:1] / 64, e[:, 1:2], e[:, 2:3]))
    weight, bias = random(shape.width, seed=3), random(shape.width, seed=4)
    row = shape.tokens * shape.width * x.element_size()
    layer_norm = F.layer_norm

    def host_add_norm(x, y):
        x = torch.addcmul(x, y, gate)
        return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)

    def host_add_affine(x, y):
        return layer_norm(x + y, x.shape[-1:], weight, bias, EPS)

    spare = torch.empty_like(x[:, : max(shape.chunks)])

    def add_norm_of_a_copy(x, y):
        copy = spare[:, : x.shape[1]]
        copy.copy_(x)
        return add_norm(copy, y, weight=weight, bias=bias, eps=EPS)

    def add_norm_elsewhere(x, y):
        return add_norm(x, y, weight=weight, bias=bias, eps=EPS, into=spare[:, : x.shape[1]])

    works: dict[str, tuple[int, dict[str, Callable]]] = {
        "gated sum, norm, modulation": (
            4 * row,
            {"host": host_add_norm, "ours": lambda x, y: add_norm(x, y, gate, scale=scale, shift=shift, eps=EPS)},
        ),
        "sum, affine norm": (
            4 * row,
            {"host": host_add_affine, "ours": lambda x, y: add_norm(x, y, weight=weight, bias=bias, eps=EPS)},
        ),
        "sum put elsewhere, affine norm": (4 * row, {"of a copy": add_norm_of_a_copy, "ours": add_norm_elsewhere}),
        "norm, modulation": (
            2 * row,
            {
                "host": lambda x, y: torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale),
                "ours": lambda x, y: add_norm(x, scale=scale, shift=shift, eps=EPS),
                "comfy-kitchen adaln": kitchen(scale, shift),
            },
        ),
        "gated sum": (
            3 * row,
            {"host": lambda x, y: torch.addcmul(x, y, gate), "ours": lambda x, y: add_(x, y, gate)},
        ),
    }
    rows: dict = {}
    for task, (size, ways) in works.items():
        for way, work in ways.items():
            for chunk in shape.chunks:

                def run(work=work, size=size, chunk=chunk):
                    pairs = list(zip(x.split(chunk, dim=1), update.split(chunk, dim=1), strict=True))

                    def all_chunks():
                        for a, b in pairs:
                            work(a, b)

                    ms = milliseconds(all_chunks, 5, 1)
                    rate = size / ms / 1e6
                    return [round(ms, 3), round(rate), round(100 * rate / copy_rate)]

                attempt(rows, f"{task}, {way}, {chunk:,} tokens", run)
    if CUDA:
        for warps in WARPS:

            def choice(warps=warps):
                ms = milliseconds(lambda: kernel.norm(x, EPS, scale, shift, True, update, gate, warps=warps), 5, 2)
                return [round(ms, 3), round(4 * row / ms / 1e6), round(400 * row / ms / 1e6 / copy_rate)]

            attempt(rows, f"gated sum, norm, modulation, {warps} warps a program", choice)
    attempt(rows, "errors", lambda: norm_errors(x, update, gate, scale, shift))
    return rows


def kitchen(scale: torch.Tensor, shift: torch.Tensor) -> Callable:
    def work(x, y):
        import comfy_kitchen

        return comfy_kitchen.adaln(x, scale, shift, EPS)

    return work


def norm_errors(x, update, gate, scale, shift) -> dict:
    """Of the new x and of the modulated norm of the exact new x."""
    x, update = x[:, -SAMPLE:].clone(), update[:, -SAMPLE:]
    new = x.double() + update.double() * gate.double()
    exact = F.layer_norm(new, new.shape[-1:], eps=EPS) * (1 + scale.double()) + shift.double()
    theirs = torch.addcmul(x, update, gate)
    their_y = torch.addcmul(shift, F.layer_norm(theirs, x.shape[-1:], eps=EPS), 1 + scale)
    y = add_norm(x, update, gate, scale=scale, shift=shift, eps=EPS)
    return {"host": [off(theirs, new), off(their_y, exact)], "ours": [off(x, new), off(y, exact)]}


# The feed-forward layer


def feed_forward_rows(shape: Shape, matmul_rate: float) -> dict:
    """`[ms, TFLOP/s, percent of the matmul rate, peak GiB beyond x and the result]` by way and chunk."""
    x = random(1, shape.tokens, shape.width)
    torch.manual_seed(0)
    up, down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)
    up, down = (layer.to(DEVICE, DTYPE).requires_grad_(False) for layer in (up, down))
    rows: dict = {"fused is not legal because": legal(up, x)}
    out = torch.empty_like(x)

    def host(x):
        return down(F.gelu(up(x), approximate="tanh"))

    def in_place(x):
        return down(torch.ops.aten.gelu_(up(x), approximate="tanh"))

    first = 2 * shape.tokens * shape.width * shape.hidden
    ways: dict[str, tuple[int, Callable]] = {
        "host": (2 * first, host),
        "GELU in place": (2 * first, in_place),
        "fused": (2 * first, lambda x: feed_forward(x, up, down)),
    }

    def timed(work, flop, chunk, keep=True):
        pairs = list(zip(x.split(chunk, dim=1), out.split(chunk, dim=1), strict=True))

        def all_chunks():
            for a, b in pairs:
                found = work(a)
                if keep:
                    b.copy_(found)

        before = 0
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        ms = milliseconds(all_chunks, 3, 1)
        peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
        rate = flop / ms / 1e9
        return [round(ms, 2), round(rate), round(100 * rate / matmul_rate), round(peak / 2**30, 2)]

    for way, (flop, work) in ways.items():
        for chunk in shape.chunks:
            attempt(rows, f"{way}, {chunk:,} tokens", lambda work=work, f=flop, c=chunk: timed(work, f, c))
    # The first product alone: what the GELU adds to it.
    alone: dict[str, Callable] = {
        "up alone": up,
        "up and GELU": lambda x: F.gelu(up(x), approximate="tanh"),
        "up and GELU, fused": lambda x: torch._addmm_activation(up.bias, x.flatten(0, 1), up.weight.t(), use_gelu=True),
    }
    for way, work in alone.items():
        for chunk in (shape.chunks[-2], shape.chunks[-1]):
            attempt(rows, f"{way}, {chunk:,} tokens", lambda work=work, c=chunk: timed(work, first, c, keep=False))

    def errors() -> dict:
        some = x[:, -SAMPLE:]
        wide = [t.double() for t in (up.weight, up.bias, down.weight, down.bias)]
        exact = F.linear(F.gelu(F.linear(some.double(), *wide[:2]), approximate="tanh"), *wide[2:])
        return {"host": off(host(some), exact), "ours": off(feed_forward(some, up, down), exact)}

    attempt(rows, "errors", errors)
    return rows


# Cross-attention


def cross_rows(shape: Shape, matmul: float) -> dict:
    """`{ms, percent of the matrix product's rate, error}` by exact backend: of one chunk of tokens against a text's
    keys and an image's, and of all tokens against a text's, by chunks as blocks have them and at once."""
    heads = max(2, shape.width // 128)
    head_dim = shape.width // heads
    q = random(1, shape.tokens, heads, head_dim)
    one = min(32 * K, shape.tokens)
    rows: dict = {}
    for backend in BACKENDS.values():
        if not backend.exact:
            continue
        if reason := backend.refusal(Situation(DEVICE, DTYPE, head_dim, windows=(TEXT, IMAGE))):
            rows[backend.name] = reason
            continue
        works = [(one, TEXT, one), (one, IMAGE, one), (shape.tokens, TEXT, one)]
        # All scores at once are more than a card holds.
        works += [] if backend.scores else [(shape.tokens, TEXT, shape.tokens)]
        for tokens, keys, chunk in dict.fromkeys(works):
            label = f"{backend.name}, {tokens:,} tokens x {keys} keys, {chunk:,} at once"
            attempt(rows, label, lambda b=backend, t=tokens, k=keys, c=chunk: cross_row(b, q[:, :t], k, c, matmul))
    return rows


def cross_row(backend: Backend, q: torch.Tensor, keys: int, chunk: int, matmul: float) -> dict:
    """Of all of q, so many tokens at once, against so many keys."""
    _, tokens, heads, head_dim = q.shape
    k, v = (random(1, keys, heads, head_dim, seed=seed) for seed in (1, 2))
    scale, sample = head_dim**-0.5, q[:, : min(SAMPLE, tokens)]
    ms = milliseconds(lambda: [backend.attend(some, k, v, scale).numel() for some in q.split(chunk, dim=1)], 5)
    exact = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (sample, k, v))).transpose(1, 2)
    rate = 4 * tokens * keys * heads * head_dim / ms / 1e9
    error = off(backend.attend(sample, k, v, scale), exact)
    return {"ms": round(ms, 3), "percent": round(100 * rate / matmul, 1), "error": error}


# Attention


def attention_rows(grid: Grid, heads: int, head_dim: int) -> dict:
    """Milliseconds of attention alone, one branch, layer by layer, by layout and by kind of numbers."""
    backend = BACKENDS["sdpa-cudnn" if CUDA else "sdpa"]
    if reason := backend.refusal(Situation(DEVICE, DTYPE, head_dim)):
        return {"not run": reason}
    n, width, scale = grid.tokens, heads * head_dim, head_dim**-0.5
    plain = [random(1, n, width, seed=s) for s in range(3)]
    ones = torch.ones(width, device=DEVICE, dtype=DTYPE)
    angle = torch.rand(1, n, head_dim // 2, device=DEVICE) * 6
    turned = (ones, EPS, angle.cos(), angle.sin())

    def windows(x: torch.Tensor, count: int, size: int) -> torch.Tensor:
        return x.flatten()[: count * size * width].view(count, size, heads, head_dim)

    # As projections are: sums of many products.
    weight = random(width, width, seed=5) / width**0.5
    projected = [x @ weight for x in plain]
    normed = [window_group(x, [None], *turned)[0] for x in projected[:2]] + [projected[2]]
    kinds = {"randn": plain, "projected": projected, "projected, normed and turned": normed}

    def after_kernels(count: int, size: int) -> float:
        """Attention as it follows norm and rotation: the kernels are queued, and only attention is timed."""
        times = []
        for _ in range(3):
            q, k = (window_group(x, [None], *turned)[0] for x in projected[:2])
            some = [windows(x, count, size) for x in (q, k, projected[2])]
            times.append(milliseconds(lambda some=some: backend.attend(*some, scale), 1, 0))
        return round(sorted(times)[1], 2)

    rows: dict = {"backend": backend.name, "layers": []}
    for layer in range(LAYERS):
        partition = WAN21.partition(layer, grid)
        (count, size), *_ = partition.window_classes(grid)
        rows["layers"].append([count, size])
        repeats = 3 if layer == 0 else 5
        for kind, tensors in kinds.items():
            qkv = [windows(x, count, size) for x in tensors]

            def attend(qkv=qkv):
                return backend.attend(*qkv, scale)

            attempt(
                rows,
                f"layer {layer}, {kind}, [windows, size, heads, head_dim]",
                lambda attend=attend, r=repeats: round(milliseconds(attend, r, 1), 2),
            )
        by_head = [windows(x, count, size).transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
        attempt(
            rows,
            f"layer {layer}, randn, [windows, heads, size, head_dim]",
            lambda qkv=by_head, r=repeats: round(milliseconds(lambda: backend.attend(*qkv, scale), r, 1), 2),
        )
        del by_head
        attempt(rows, f"layer {layer}, right after its kernels", lambda c=count, n=size: after_kernels(c, n))
    return rows


def milliseconds(work: Callable[[], object], repeats: int = 5, warm: int = 1) -> float:
    """Median of single runs on the device at hand."""
    return timed_ms(work, DEVICE, repeats, warm)


def attempt(rows: dict, label: str, work: Callable[[], object]) -> None:
    """Put a result, or why there is none, under its label, and print it."""
    try:
        rows[label] = work()
    except Exception as error:
        rows[label] = f"failed: {type(error).__name__}: {error}"[:400]
        if CUDA:
            torch.cuda.empty_cache()
    if not isinstance(rows[label], dict) or not any(isinstance(row, dict) for row in rows[label].values()):
        print(f"  {label}: {json.dumps(rows[label])}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="parts whose name has such a word")
    options = parse_with_out(parser)
    began = time.perf_counter()
    limits = measure_ceilings(DEVICE, options.tiny)
    matmul, copy = limits.matmul_tflops, limits.copy_tb_s * 1e3
    results: dict = {"machine": machine(DEVICE), "ceilings": asdict(limits)}
    print(json.dumps(results), flush=True)

    def keep() -> None:
        results["seconds"] = round(time.perf_counter() - began, 1)
        save(options.out, results)
        if CUDA:
            torch.cuda.empty_cache()

    parts: dict[str, Callable[[], dict]] = {}
    for shape in TINY if options.tiny else SHAPES:
        parts[f"{shape.name}, norms and sums"] = lambda shape=shape: norm_rows(shape, copy)
        parts[f"{shape.name}, feed-forward"] = lambda shape=shape: feed_forward_rows(shape, matmul)
        parts[f"{shape.name}, cross-attention"] = lambda shape=shape: cross_rows(shape, matmul)
    grid, heads = (Grid(2, 6, 10), 2) if options.tiny else (Grid(21, 136, 240), 12)
    parts["windows"] = lambda: attention_rows(grid, heads, 128)
    for name, work in parts.items():
        if not options.only or any(word in name for word in options.only):
            print(name, flush=True)
            attempt(results, name, work)
            keep()
    print(f"seconds: {time.perf_counter() - began:.0f}")


if __name__ == "__main__":
    main()
