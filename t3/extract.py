"""`python -m t3.extract`: a T3-tuned model as a LoRA for the model it was tuned from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli
from .plan import PRESETS
from .plan_choice import named_plan
from .weights import open_weights
from .weights.extract import DEFAULT_ERROR, extract
from .weights.extract_factors import ROUNDING
from .weights.extract_report import Change, Extraction
from .weights.spelling import DIALECTS


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.extract`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.extract",
        description="Write what tuning added to a model as a LoRA, with the full differences of biases, norms and "
        "tables. Added to BASE at strength 1 it gives TUNED, up to an error that is measured for every layer. Memory "
        "for a few tensors is enough.",
        epilog="exit status: 0 the file is on disk; 1 something failed; 2 bad arguments or input; 130 interrupted",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="model that TUNED was trained from; file or folder")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="tuned model, same sizes; file or folder")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=".safetensors file to write")
    parser.add_argument("--rank", type=_rank, default="auto", help="a number, or auto: as --error asks (default)")
    parser.add_argument(
        "--error",
        type=float,
        default=DEFAULT_ERROR,
        help="what a layer's change may lose with --rank auto, relative, in the Frobenius norm (default: %(default)s, "
        "which is 1 %% of its energy; two bf16 files are rounded by as much where 2 %% of the weights changed)",
    )
    parser.add_argument("--max-rank", type=int, help="highest rank of --rank auto; layers that miss --error are told")
    parser.add_argument(
        "--plan",
        default="auto",
        help=f"plan TUNED was tuned for, kept in the file: {', '.join(PRESETS)}, a JSON file, none, or auto: what "
        "TUNED carries, else the released plan for its kind of model (default)",
    )
    parser.add_argument(
        "--dialect", choices=list(DIALECTS), default="comfyui", help="names to write (default: comfyui)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *ROUNDING),
        default="auto",
        help="of factors and matrices (default: bfloat16, or float32 where --error is below 0.01); the rest is float32",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default): a card if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace output that exists")
    parser.add_argument("--dry-run", action="store_true", help="check both files and say what would be done")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the results on standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run("t3.extract", lambda: _extract(args), as_json=args.json)


def _extract(args: argparse.Namespace) -> int:
    plan = None if args.plan == "none" else args.plan if args.plan == "auto" else named_plan(args.plan)[0]
    base, tuned = open_weights(args.base), open_weights(args.tuned)
    result = extract(
        base,
        tuned,
        args.out,
        rank=args.rank,
        error=args.error,
        max_rank=args.max_rank,
        plan=plan,
        dialect=args.dialect,
        dtype=args.dtype,
        device=args.device,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=_progress,
    )
    for line in _summary(args, result):
        cli.say(line)
    if args.json:
        cli.print_json(result.to_json(), indent=2)
    return 0


def _rank(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is neither "auto" nor a whole number')
    return text if text == "auto" else int(text)


def _progress(done: int, total: int, name: str, change: Change | None) -> None:
    cli.say(f"[{done}/{total}] {change.describe() if change else f'{name}: unchanged'}")


def _summary(args: argparse.Namespace, result: Extraction) -> list[str]:
    lines = [f"compared   {result.tensors} parameters, {result.matrices} of them matrices"]
    if result.path is None:
        lines[0] = lines[0].replace("compared", "dry run ")
        lines.append(f"would go   to {args.out}, as {args.dialect} names")
    else:
        lines.append(f"wrote      {result.path}: {result.nbytes / 2**20:,.1f} MiB in {result.seconds:.0f} s")
    return [*lines, *result.describe()]


if __name__ == "__main__":
    sys.exit(main())
