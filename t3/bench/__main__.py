"""`python -m t3.bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import cli
from ..errors import T3Error

SUBCOMMANDS = {
    "attention": "self-attention of one layer, from projections to merged result: T3, the released semantics, dense",
    "peers": "other people's attention on the same tokens: dense kernels, FlexAttention, 8-bit kernels, sol_attn",
    "kernels": "the passes around the windows against the copy bandwidth; checks of them at full size",
    "model": "a forward pass of the whole transformer, in diffusers and (--comfyui) in ComfyUI",
    "decode": "the exact tiled decode at 4K within bounds of memory, and the errors of decodes",
    "growth": "time and memory from 480p to 8K, dense beside T3; short clips, where T3 stops paying",
    "scaling": "bytes, time and cost of a 4K clip on many GPUs: computed, beside what files of measurements hold",
    "plot": "tables and PNG plots from files that --out wrote, on any machine",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.bench`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.bench",
        description="How fast T3 is on this machine, beside the machine's limits and other implementations, all "
        "measured in one run on random data. Peers that are not installed are named and left out.",
        epilog="exit status: 0 done, what could not be measured is named in the tables; 2 bad arguments or input; "
        "130 interrupted (--out and --csv keep what was measured)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    found = {name: commands.add_parser(name, help=text, description=text) for name, text in SUBCOMMANDS.items()}
    for name, command in found.items():
        if name == "scaling":
            command.add_argument(
                "files",
                type=Path,
                nargs="*",
                metavar="FILE",
                help="JSON of benchmarks/parallel_4k.py and parallel_decode.py",
            )
            command.add_argument("--price", type=float, default=2.5, metavar="N", help="of a GPU's hour (default: 2.5)")
            command.add_argument("--into", type=Path, metavar="FILE", help="a document whose figures to replace")
            command.add_argument("--plot", type=Path, metavar="FILE", help="a PNG to draw, or to draw anew")
            continue
        command.add_argument("--plots", type=Path, metavar="DIR", help="draw PNG files there (needs matplotlib)")
        command.add_argument("--overwrite", action="store_true", help="replace output that exists")
        if name == "plot":
            command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON that --out wrote")
            continue
        command.add_argument("--out", type=Path, metavar="FILE", help="JSON with everything, written after each row")
        command.add_argument("--csv", type=Path, metavar="FILE", help="CSV to add a line to for each figure")
        command.add_argument(
            "--seconds", type=float, metavar="N", help="begin no row after so long; say what is left out"
        )
        command.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name has one of these words")
        command.add_argument("--tiny", action="store_true", help="small sizes: try every row in seconds, on a CPU too")
    for name in ("attention", "peers", "kernels"):
        found[name].add_argument("--cases", nargs="+", metavar="CASE", help='grids, by name, such as "1.3B 4K"')
    model = found["model"]
    model.add_argument("--models", nargs="+", default=["1.3b"], choices=("1.3b", "5b", "14b"))
    model.add_argument("--sizes", nargs="+", default=["4k"], metavar="SIZE", help="480p 720p 1080p 1440p 4k 8k")
    model.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="rows of these beside auto")
    model.add_argument(
        "--memory", nargs="+", default=[], metavar="HOW", help="rows of fast, lean, or GiB for attention"
    )
    model.add_argument("--compile", action="store_true", help="a row with torch.compile (a minute to compile)")
    model.add_argument("--no-dense", action="store_true", help="leave out dense attention")
    model.add_argument("--comfyui", type=Path, metavar="FOLDER", help="rows of the real ComfyUI in FOLDER instead")
    found["decode"].add_argument("--vaes", nargs="+", default=["2.1", "2.2"], choices=("2.1", "2.2"))
    found["growth"].add_argument(
        "--sizes", nargs="+", metavar="SIZE", help="480p 720p 1080p 1440p 4k 8k (default: all)"
    )
    found["growth"].add_argument(
        "--dense-seconds",
        type=float,
        default=8.0,
        metavar="N",
        help="compute dense layers that take longer (default: 8)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    of_files = {"plot": _plot, "scaling": _scaling}.get(args.command)
    work = (lambda: _bench(args, arguments)) if of_files is None else (lambda: of_files(args))
    return cli.run("t3.bench", work, as_json=False)


def _bench(args: argparse.Namespace, arguments: list[str]) -> int:
    _check_above(args, "seconds")
    _check_above(args, "dense_seconds")
    if args.plots:
        from .plots import check_plots

        check_plots(args.plots, _prefix(args), args.overwrite)
    import torch

    from .report import Report

    check = _work(args)
    if not args.tiny and not torch.cuda.is_available():
        raise T3Error(
            f"torch {torch.__version__} sees no CUDA card here, and on a CPU these sizes take hours. Try every row at "
            "small ones: add --tiny."
        )
    report = Report(
        _without_places(arguments),
        out=args.out,
        csv=args.csv,
        seconds=args.seconds,
        only=args.only,
        overwrite=args.overwrite,
        tiny=args.tiny,
    )
    with torch.inference_mode():
        check(report)
    data = report.close()
    if args.plots:
        _draw(data, args.plots, _prefix(args))
    return 0


def _check_above(args: argparse.Namespace, name: str) -> None:
    """Raise T3Error for a number of seconds that is none, or not above 0."""
    value = getattr(args, name, None)
    if value is not None and not 0 < value < math.inf:
        raise T3Error(f"--{name.replace('_', '-')} is {value:g}; give a number above 0.")


def _without_places(arguments: list[str]) -> list[str]:
    """What was measured, without where this machine keeps files."""
    kept, places = [], ("--out", "--csv", "--plots", "--comfyui")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, _, value = argument.partition("=")
        if before in places:
            kept += ["..."] if before == "--comfyui" else []
        elif name == "--comfyui":
            kept += ["--comfyui", *(["..."] if value else [])]
        elif name not in places and argument != "--overwrite":
            kept.append(argument)
    return kept


def _work(args: argparse.Namespace) -> Any:
    """The function of a report that does the work; its arguments are checked here, before any work."""
    if args.command in ("attention", "peers", "kernels"):
        from .cases import pick_cases

        if args.command == "attention":
            from .attention import run_attention

            cases = pick_cases(args.cases, args.tiny)
            return lambda report: run_attention(report, cases)
        if args.command == "peers":
            from .peers import NAMES, run_peers

            cases = pick_cases(args.cases or (None if args.tiny else list(NAMES)), args.tiny)
            return lambda report: run_peers(report, cases)
        from .kernels import run_kernels

        # Its rows are of one grid, unless others are named.
        cases = pick_cases(args.cases, args.tiny)
        return lambda report: run_kernels(report, cases if args.cases else cases[:1])
    if args.command == "decode":
        from .decode import run_decode

        return lambda report: run_decode(report, args.vaes)
    from .transformer import size_of

    if args.command == "growth":
        from .growth import SIZES, run_growth

        sizes = args.sizes or list(SIZES)
        for size in sizes:
            size_of(size)
        return lambda report: run_growth(report, sizes, args.dense_seconds)
    if args.comfyui:
        from .comfyui import check_comfyui, run_comfyui

        unused = [
            option
            for option, value in (
                ("--sizes", args.sizes != ["4k"]),
                ("--backends", args.backends),
                ("--memory", args.memory),
                ("--compile", args.compile),
                ("--no-dense", args.no_dense),
            )
            if value
        ]
        if unused:
            raise T3Error(f"--comfyui has rows of its own, at 4K, which --only picks: leave out {', '.join(unused)}.")
        check_comfyui(args.comfyui, args.models)
        return lambda report: run_comfyui(report, args.comfyui, args.models, args.only or [])
    from .model import run_model

    for size in args.sizes:
        size_of(size)
    _check_backends(args.backends)
    memory = [_memory(how) for how in args.memory]
    return lambda report: run_model(
        report,
        args.models,
        args.sizes,
        backends=args.backends,
        memory=memory,
        compiled=args.compile,
        dense=not args.no_dense,
    )


def _memory(how: str) -> str | int:
    """What `install_t3` takes: a mode, or bytes."""
    from ..memory import FAST, LEAN

    if how in (FAST, LEAN):
        return how
    try:
        gib = float(how)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise T3Error(f"--memory {how!r} is neither {FAST}, {LEAN} nor a number of GiB above 0.")
    return int(gib * 2**30)


def _check_backends(names: list[str]) -> None:
    from ..backends import BACKENDS

    for name in names:
        if name not in BACKENDS:
            raise T3Error(f"--backends {name!r} is not known; known are {', '.join(BACKENDS)}.")


def _prefix(args: argparse.Namespace) -> str:
    return args.out.stem if args.out else args.command


def _plot(args: argparse.Namespace) -> int:
    from .plots import check_plots

    found = [_read(file) for file in args.files]
    names = [file.stem for file in args.files]
    if args.plots:
        for name in names:
            if names.count(name) > 1:
                raise T3Error(
                    f"two files are called {name}: their plots would have the same names. Draw one at a time."
                )
            check_plots(args.plots, name, args.overwrite)
    for (data, text), name in zip(found, names, strict=True):
        print(text, flush=True)
        if args.plots:
            _draw(data, args.plots, name)
    return 0


def _scaling(args: argparse.Namespace) -> int:
    from .scaling import Measured
    from .scaling_plot import check_plot, draw_scaling
    from .scaling_tables import check_into, document, put_into

    if not 0 < args.price < math.inf:
        raise T3Error(f"--price is {args.price:g}; give what a GPU's hour costs, above 0.")
    measured = Measured.read(args.files)
    if args.into:
        check_into(args.into)
    if args.plot:
        check_plot(args.plot)
    text = document(measured, args.price)
    print(text, flush=True)
    if args.plot:
        draw_scaling(measured, args.plot)
        cli.say(f"wrote      {args.plot}")
    if args.into:
        put_into(args.into, text)
        cli.say(f"wrote      {args.into}")
    return 0


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """Results of an earlier run, and their tables."""
    from .tables import all_tables

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise T3Error(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("t3_bench") != 1:
        raise T3Error(f'{file} is not what --out writes (no "t3_bench": 1 in it).')
    try:
        return data, all_tables(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise T3Error(f"{file} is damaged: {type(error).__name__}: {error}") from None


def _draw(data: dict[str, Any], folder: Path, prefix: str) -> None:
    from .plots import draw

    for path in draw(data, folder, prefix):
        cli.say(f"wrote      {path}")


if __name__ == "__main__":
    sys.exit(main())
