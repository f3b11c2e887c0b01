"""Time the fused path around the windows, its kernels and what it replaces, on one GPU; check the kernels at full size.

    python benchmarks/window_kernels.py --out results.json

Needs torch and Triton. Random data in the shapes of self-attention of one layer; "cycle" is the sum over the plan's
five layers, from projected q, k, v to the merged output, norm and rotation included. About 90 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from t3 import Grid, Partition, Plan, t3_attention
from t3.backends import BACKENDS, Backend, Situation, choose
from t3.cost import attention_pairs
from t3.fused import attention_from_projections
from t3.kernels.window_group import kernel as group_kernel
from t3.kernels.window_group import naive as group_naive
from t3.kernels.window_merge import kernel as merge_kernel
from t3.windows import groupings, token_rows, window_indices

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
EPS = 1e-6
LAYERS = 5
# Warps and tokens of a program.
CHOICES = [(2, 1), (4, 1), (1, 1), (8, 1), (1, 4), (4, 4)]


@dataclass(frozen=True)
class Case:
    """A grid under a plan, and the model's heads."""

    name: str
    plan: Plan
    grid: Grid
    heads: int
    head_dim: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def partition(self, layer: int) -> Partition:
        return self.plan.partition(layer, self.grid)


WAN21, WAN22 = Plan.preset("wan2.1-4k"), Plan.preset("wan2.2-4k")
CASES = [
    Case("1.3B 4K", WAN21, Grid(21, 136, 240), 12),
    Case("5B 4K", WAN22, Grid(21, 68, 120), 24),
    Case("1.3B 720p", WAN21, Grid(21, 45, 80), 12),
    Case("1.3B odd", WAN21, Grid(21, 67, 121), 12),
]
SMALL = Plan("small", Grid(2, 6, 10), (("each", 1, 1), (1, 2, 5), (1, 3, 2), (2, 2, 2), (1, 2, 2)))
TINY = [Case("tiny", SMALL, Grid(2, 6, 10), 2, 64), Case("tiny odd", SMALL, Grid(3, 5, 7), 2, 64)]


@dataclass
class Data:
    """Projected q, k, v `[1, N, width]`, norm weights, and the rotations `[1, N, 1, head_dim/2, 2, 2]` as ComfyUI's."""

    case: Case
    dtype: torch.dtype = torch.bfloat16
    qkv: list[torch.Tensor] = field(init=False)
    norms: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    freqs: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, n = self.case, self.case.grid.tokens
        generator = torch.Generator(DEVICE).manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        self.qkv = [random(1, n, case.width).to(self.dtype) for _ in range(3)]
        self.norms = ((1 + random(case.width) / 4).to(self.dtype), (1 + random(case.width) / 4).to(self.dtype))
        angle = random(1, n, 1, case.head_dim // 2) * 3
        self.freqs = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))

    @property
    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.freqs[:, :, 0, :, 0, 0], self.freqs[:, :, 0, :, 1, 0]


def milliseconds(work: Callable[[], object], repeats: int = 5, warm: int = 1) -> float:
    """Median of single runs; results are dropped at once."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        if CUDA:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


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


# What the fused path replaces


def rotate_float32(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """As ComfyUI's `apply_rope1` in plain torch. x: `[B, N, heads, head_dim]`."""
    pairs = x.to(freqs.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    out = freqs[..., 0] * pairs[..., 0]
    out.addcmul_(freqs[..., 1], pairs[..., 1])
    return out.reshape(x.shape).type_as(x)


def unfused(data: Data, partition: Partition, backend: Backend | str) -> torch.Tensor:
    """Norm and rotation by torch, then `t3_attention`: the path for memory bounds, global tokens and training."""
    q, k, v = data.qkv
    heads = data.case.heads
    q, k = (
        rotate_float32(F.rms_norm(x, x.shape[-1:], w, EPS).unflatten(-1, (heads, -1)), data.freqs)
        for x, w in zip((q, k), data.norms, strict=True)
    )
    return t3_attention(q, k, v.unflatten(-1, (heads, -1)), data.case.grid, partition, backend=backend).flatten(2)


def fused(data: Data, partition: Partition, backend: Backend | str) -> torch.Tensor:
    return attention_from_projections(
        *data.qkv,
        data.case.grid,
        partition,
        heads=data.case.heads,
        norms=data.norms,
        eps=EPS,
        turns=data.turns,
        backend=backend,
    )


def released(data: Data, partition: Partition, backend: Backend) -> torch.Tensor:
    """The released semantics: norm in float32, rotation in float64, both branches always, copies by rearrangement."""
    q, k, v = data.qkv
    grid, heads = data.case.grid, data.case.heads
    turn = torch.complex(*(table.double() for table in data.turns))[:, :, None]

    def prepare(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * weight
        x = torch.view_as_complex(x.double().unflatten(-1, (heads, -1, 2)))
        return torch.view_as_real(x * turn).flatten(3).float().to(v.dtype)

    q, k, v = prepare(q, data.norms[0]), prepare(k, data.norms[1]), v.unflatten(-1, (heads, -1))
    # [B, axis split in two, ...]: windows first or tokens of a window first.
    local = [y for n, c in zip(grid, partition, strict=True) for y in (c, n // c)]
    strided = [y for n, c in zip(grid, partition, strict=True) for y in (n // c, c)]
    to_windows = {"local": (0, 1, 3, 5, 2, 4, 6, 7, 8), "strided": (0, 2, 4, 6, 1, 3, 5, 7, 8)}
    total = None
    for name, split in (("local", local), ("strided", strided)):
        order = to_windows[name]
        shape = (q.shape[0], *split, heads, data.case.head_dim)
        windows = [x.reshape(shape).permute(order).flatten(4, 6).flatten(0, 3) for x in (q, k, v)]
        out = backend.attend(*windows, data.case.head_dim**-0.5)
        out = out.reshape([shape[i] for i in order]).permute([order.index(i) for i in range(9)]).reshape(q.shape)
        total = out if total is None else (total + out) / 2
    assert total is not None
    return total.flatten(2)


def windows_alone(data: Data, partition: Partition, backend: Backend) -> float:
    """Milliseconds of attention alone, once for each branch, on tensors grouped before."""
    case = data.case
    branches = len(groupings(case.grid, partition))

    def work() -> None:
        start = 0
        for windows, size in partition.window_classes(case.grid):
            some = [x[0, start : start + windows * size].unflatten(0, (windows, size)) for x in data.qkv]
            backend.attend(*(x.unflatten(-1, (case.heads, -1)) for x in some), case.head_dim**-0.5)
            start += windows * size

    return branches * milliseconds(work, 3)


# Errors


def exact_tokens(data: Data, partition: Partition, tokens: list[int]) -> torch.Tensor:
    """The output at a few tokens in float64, `[tokens, width]`, straight from the definition."""
    case = data.case
    q, k, v = (x[0] for x in data.qkv)
    turn = torch.complex(*(table[0].double() for table in data.turns))[:, None]

    def prepare(x: torch.Tensor, weight: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x = x[at].double()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
        x = torch.view_as_complex(x.unflatten(-1, (case.heads, -1, 2)).contiguous()) * turn[at]
        return torch.view_as_real(x).flatten(-2)

    outs = []
    for token in tokens:
        mean = torch.zeros(case.width, dtype=torch.float64, device=DEVICE)
        kinds = groupings(case.grid, partition)
        for kind in kinds:
            classes = window_indices(tuple(case.grid), tuple(partition), kind, DEVICE)
            window = next(index[(index == token).any(1)][0] for index in classes if (index == token).any())
            one = prepare(q, data.norms[0], torch.tensor([token], device=DEVICE))[0]
            keys = prepare(k, data.norms[1], window)
            scores = torch.einsum("hd,mhd->hm", one, keys) * case.head_dim**-0.5
            values = v[window].double().unflatten(-1, (case.heads, -1))
            mean += torch.einsum("hm,mhd->hd", scores.softmax(-1), values).flatten() / len(kinds)
        outs.append(mean)
    return torch.stack(outs)


def error(out: torch.Tensor, exact: torch.Tensor, tokens: list[int]) -> float:
    """Relative to float64, over all sampled tokens."""
    got = out[0, tokens].double()
    return float(f"{((got - exact).norm() / exact.norm()).item():.3g}")


# Kernels


def kernel_rows(data: Data, copy_rate: float) -> dict:
    """Each kernel under each choice of warps and tokens a program: `[ms, GB/s, percent of the copy rate]`."""
    case = data.case
    row = case.grid.tokens * case.width * data.dtype.itemsize
    turn = case.grid.tokens * case.head_dim * 8  # each pair's four float32, of which two are used, fill whole sectors
    x, weight, turns = data.qkv[0], data.norms[0], data.turns
    moved = list(token_rows(tuple(case.grid), tuple(case.partition(4)), 1, DEVICE))
    parts = [torch.randn_like(x[0]) for _ in range(2)]
    compact = tuple(table.contiguous() for table in turns)
    diffusers = tuple(table.repeat_interleave(2, dim=-1)[..., ::2] for table in turns)
    group, merge = group_kernel.window_group, merge_kernel.window_merge
    works = {
        "q, two groupings": (3 * row + turn, lambda **how: group(x, moved, weight, EPS, *turns, **how)),
        "q, in place of one": (2 * row + turn, lambda **how: group(x, [None], weight, EPS, *turns, **how)),
        "v, two groupings": (3 * row, lambda **how: group(x, moved, **how)),
        "v, one grouping": (2 * row, lambda **how: group(x, moved[1:], **how)),
        "merge": (3 * row, lambda **how: merge(parts, moved, 1, **how)),
        "q, diffusers' tables": (3 * row + turn, lambda **how: group(x, moved, weight, EPS, *diffusers, **how)),
        "q, compact tables": (3 * row + turn // 2, lambda **how: group(x, moved, weight, EPS, *compact, **how)),
        "q, norm only": (3 * row, lambda **how: group(x, moved, weight, EPS, **how)),
    }

    rows: dict = {}
    best: dict = {}
    choices = CHOICES if CUDA else [(1, 1), (4, 3)]
    for label, (size, work) in works.items():
        # Each choice is a compilation.
        few = "table" in label or "only" in label
        for warps, tokens in choices[:2] if few else choices:

            def run(work=work, size=size, warps=warps, tokens=tokens, label=label):
                ms = milliseconds(lambda: work(warps=warps, tokens=tokens), 7, 2)
                if label not in best or ms < best[label][0]:
                    best[label] = (ms, warps, tokens)
                rate = size / ms / 1e6
                return [round(ms, 3), round(rate), round(100 * rate / copy_rate)]

            attempt(rows, f"{label}, {warps} warps, {tokens} tokens", run)
    rows["best"] = {label: {"ms": round(b[0], 3), "warps": b[1], "tokens": b[2]} for label, b in best.items()}
    # The rest of the run uses what won.
    if "q, two groupings" in best:
        _, group_kernel.WARPS, group_kernel.TOKENS = best["q, two groupings"]
    if "merge" in best:
        _, merge_kernel.WARPS, merge_kernel.TOKENS = best["merge"]
    for layer in range(LAYERS):
        at = list(token_rows(tuple(case.grid), tuple(case.partition(layer)), 1, DEVICE))

        def per_layer(at=at):
            moved_at = [one for one in at if one is not None]
            q = milliseconds(lambda: group(x, at, weight, EPS, *turns))
            v = milliseconds(lambda: group(x, moved_at)) if moved_at else 0.0
            merged = milliseconds(lambda: merge(parts, at, 1)) if len(at) == 2 else 0.0
            return {"q": round(q, 3), "v": round(v, 3), "merge": round(merged, 3), "all": round(2 * q + v + merged, 3)}

        attempt(rows, f"layer {layer}", per_layer)
    return rows


def check_rows(case: Case) -> dict:
    """What tests cannot show at small sizes: offsets beyond 2^31, every row written, runs equal bit for bit."""
    rows: dict = {}
    batch = 3 if CUDA else 2
    n, width = case.grid.tokens, case.width
    generator = torch.Generator(DEVICE).manual_seed(2)
    # One slice of a fused projection: rows lie three widths apart.
    x = torch.empty(batch, n, 3 * width, dtype=torch.bfloat16, device=DEVICE)
    for sample in x:
        sample.normal_(generator=generator)
    x = x[..., width : 2 * width]
    weight = torch.ones(width, device=DEVICE)
    angle = torch.randn(1, n, case.head_dim // 2, device=DEVICE, generator=generator)
    arguments = (weight, EPS, angle.cos(), angle.sin())
    at = list(token_rows(tuple(case.grid), tuple(case.partition(4)), batch, DEVICE))
    rows["elements"] = {
        "x, with what lies between": (batch - 1) * x.stride(0) + n * x.stride(1),
        "out": batch * n * width,
    }
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
    rows["new memory is NaN"] = bool(torch.empty(1000, device=DEVICE).isnan().all())
    outs = group_kernel.window_group(x, at, *arguments)
    torch.use_deterministic_algorithms(False)

    def finite(y: torch.Tensor) -> bool:
        return all(bool(torch.isfinite(part).all()) for part in y.chunk(8))

    def far_rows() -> float:
        """Tokens of the last sample, whose offsets are the largest, against float64."""
        some = torch.randint(0, n, (min(n, 4096),), device=DEVICE, generator=generator)
        some[0] = n - 1
        turns = (angle.cos()[:, some], angle.sin()[:, some])
        (exact,) = group_naive.window_group(x[-1:, some].double(), [None], weight, EPS, *turns)
        return max(
            ((o[to[-1, some].long()].double() - exact).norm() / exact.norm()).item()
            for o, to in zip(outs, at, strict=True)
        )

    attempt(rows, "every row written", lambda: all(finite(out) for out in outs))
    attempt(rows, "error to float64, last sample", lambda: float(f"{far_rows():.3g}"))

    def again() -> bool:
        second = group_kernel.window_group(x, at, *arguments)
        return all(torch.equal(a, b) for a, b in zip(outs, second, strict=True))

    attempt(rows, "second run bit-equal", again)

    def merged() -> dict:
        torch.use_deterministic_algorithms(True, warn_only=True)
        out = merge_kernel.window_merge(outs, at, batch)
        torch.use_deterministic_algorithms(False)
        some = torch.randint(0, n, (min(n, 4096),), device=DEVICE, generator=generator)
        expected = (outs[0][at[0][-1, some].long()] + outs[1][at[1][-1, some].long()]) / 2
        return {
            "every row written": finite(out),
            "equals torch": bool(torch.equal(out[-1, some], expected)),
            "second run bit-equal": bool(torch.equal(out, merge_kernel.window_merge(outs, at, batch))),
        }

    attempt(rows, "merge", merged)
    return rows


# Layers


def layer_rows(data: Data, matmul_rate: float, thorough: bool) -> dict:
    """Every path, layer by layer: milliseconds, peak beyond what lay there before, error to float64."""
    case = data.case
    situation = Situation(DEVICE, data.dtype, case.head_dim)
    auto, why = choose("auto", situation)
    left_out = ("sdpa", "sdpa-math", "sdpa-efficient")
    usable = [b for b in BACKENDS.values() if b.refusal(situation) is None and b.name not in left_out]
    if not thorough:
        usable = [b for b in usable if b == auto or b.name.startswith("flash-attn")]
    if not CUDA:
        usable = [auto]
    rows: dict = {"auto": why, "layers": [case.partition(i) for i in range(LAYERS)]}
    floors = []
    for layer in range(LAYERS):
        flop = 4 * attention_pairs(case.grid, case.partition(layer)) * case.width
        floors.append(flop / matmul_rate / 1e9)
    rows["floor"] = {"ms": [round(f, 2) for f in floors], "cycle": round(sum(floors), 1)}
    paths: dict[str, Callable[[Partition], torch.Tensor]] = {
        f"fused, {b.name}": lambda p, b=b: fused(data, p, b) for b in usable
    }
    paths[f"unfused, {auto.name}"] = lambda p: unfused(data, p, auto)
    divides = all(not n % c for i in range(LAYERS) for n, c in zip(case.grid, case.partition(i), strict=True))
    if thorough and divides:
        paths[f"as released, {auto.name}"] = lambda p: released(data, p, auto)
    generator = torch.Generator().manual_seed(3)
    tokens = [0, case.grid.tokens - 1, *torch.randint(0, case.grid.tokens, (6,), generator=generator).tolist()]
    exact = [exact_tokens(data, case.partition(layer), tokens) for layer in range(LAYERS)]

    def run(path: Callable[[Partition], torch.Tensor]) -> dict:
        ms, errors, peaks = [], [], []
        for layer in range(LAYERS):
            partition = case.partition(layer)
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            out = path(partition)
            errors.append(error(out, exact[layer], tokens))
            if CUDA:
                peaks.append(round((torch.cuda.max_memory_allocated() - before) / 2**30, 2))
            del out
            ms.append(milliseconds(lambda partition=partition: path(partition), 3, 0))
        return {"ms": [round(m, 2) for m in ms], "cycle": round(sum(ms), 1), "error": errors, "peak_gib": peaks}

    def alone(backend: Backend) -> dict:
        ms = [windows_alone(data, case.partition(layer), backend) for layer in range(LAYERS)]
        return {"ms": [round(m, 2) for m in ms], "cycle": round(sum(ms), 1)}

    for backend in usable:
        if backend == auto or backend.name.startswith("flash-attn"):
            attempt(rows, f"windows alone, {backend.name}", lambda backend=backend: alone(backend))
    for label, path in paths.items():
        attempt(rows, label, lambda path=path: run(path))
    if thorough:
        attempt(
            rows, "fused: second run bit-equal", lambda: [_twice(data, case.partition(i), auto) for i in range(LAYERS)]
        )
    return rows


def _twice(data: Data, partition: Partition, backend: Backend) -> bool:
    return bool(torch.equal(fused(data, partition, backend), fused(data, partition, backend)))


def ceilings() -> tuple[dict, float, float]:
    """This card's own: bfloat16 matrix products in TFLOP/s, a copy in GB/s read and written."""
    size, count = (8192, 2**30) if CUDA else (256, 2**20)
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    matmul = 2 * size**3 / milliseconds(lambda: a @ b, 15, 5) / 1e9
    source, target = (torch.randn(count, device=DEVICE).bfloat16() for _ in range(2))
    copy = 4 * count / milliseconds(lambda: target.copy_(source), 9, 2) / 1e6
    return {"matmul TFLOP/s": round(matmul), "copy GB/s": round(copy)}, matmul, copy


def machine() -> dict:
    import triton

    found = {"gpu": "none", "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
    if CUDA:
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
    return found | {"command": " ".join(sys.argv)}


def summary(results: dict, cases: list[Case]) -> None:
    """A short table, last, of cycles and their ratio to the floor."""
    print("\nbest kernels:", json.dumps(results.get("kernels", {}).get("best")))
    print("checks:", json.dumps(results.get("checks")))
    for case in cases:
        rows = results.get(case.name)
        if not isinstance(rows, dict):
            print(case.name, rows)
            continue
        floor = max(rows["floor"]["cycle"], 0.1)
        print(f"\n{case.name}: {tuple(case.grid)}, {case.heads}x{case.head_dim}: ms a layer | cycle | / floor")
        for label, row in rows.items():
            if isinstance(row, dict) and "cycle" in row:
                ms = " ".join(f"{m:8.2f}" for m in row["ms"])
                more = f" err {max(row['error']):.1e}" if row.get("error") else ""
                more += f" peak {max(row['peak_gib']):.1f}" if row.get("peak_gib") else ""
                print(f"  {label:28} {ms} | {row['cycle']:8.1f} | {row['cycle'] / floor:5.2f}{more}")
            elif isinstance(row, str) and row.startswith("failed"):
                print(f"  {label:28} {row[:120]}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, to try the script, under TRITON_INTERPRET=1 too"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="names of cases; the first also has its kernels timed"
    )
    parser.add_argument("--seconds", type=float, default=110.0, help="begin no further case after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    cases = [case for case in (TINY if options.tiny else CASES) if not options.only or case.name in options.only]
    results: dict = {"machine": machine()}
    results["ceilings"], matmul, copy = ceilings()
    print(json.dumps(results), flush=True)

    def save() -> None:
        results["seconds"] = round(time.perf_counter() - began, 1)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
        if CUDA:
            torch.cuda.empty_cache()

    for number, case in enumerate(cases):
        if time.perf_counter() - began > options.seconds:
            results[case.name] = "not run: time was up"
            continue
        print(case.name, flush=True)
        data = Data(case)
        if number == 0:
            attempt(results, "kernels", lambda data=data: kernel_rows(data, copy))
            save()
        attempt(results, case.name, lambda data=data, number=number: layer_rows(data, matmul, number == 0))
        save()
        if number == 0:
            del data
            attempt(results, "checks", lambda case=case: check_rows(case))
        save()
    summary(results, cases)
    print("seconds:", results["seconds"])


if __name__ == "__main__":
    main()
