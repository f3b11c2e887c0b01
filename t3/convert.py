"""`python -m t3.convert`: weights from one dialect of key names to another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli
from .errors import T3Error
from .weights import identify, open_weights
from .weights.peft_settings import SETTINGS_FILE
from .weights.respell import respell
from .weights.spelling import DIALECTS, dialect_of
from .weights.write import write_safetensors


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.convert",
        description="Write weights (a whole model, a LoRA, LoKr, LoHa, DoRA or difference) under the names of another "
        "dialect. Values stay as they are and metadata is kept; memory for one tensor is enough.",
        epilog="exit status: 0 the file is on disk; 1 something failed; 2 bad arguments or input; 130 interrupted",
    )
    parser.add_argument("file", type=Path, help="safetensors file, index, or folder that holds one set of weights")
    parser.add_argument("--to", required=True, choices=list(DIALECTS), help="dialect to write")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=".safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace output that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the results on standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run("t3.convert", lambda: _convert(args), as_json=args.json)


def _convert(args: argparse.Namespace) -> int:
    dialect = dialect_of(args.to)
    if args.out.suffix.lower() != ".safetensors":
        raise T3Error(f"--out {args.out} must end in .safetensors, so that programs know what it is.")
    if dialect.name == "peft" and (args.out.parent / SETTINGS_FILE).exists():
        raise T3Error(
            f"{args.out.parent} holds an {SETTINGS_FILE}, whose alpha would scale the new file a second time. "
            "Choose another folder."
        )
    file = open_weights(args.file)
    found = identify(file)
    out = respell(file, found, dialect)
    path = write_safetensors(args.out, out.entries, out.metadata, overwrite=args.overwrite)
    cli.say(f"read       {args.file}: {found.what}, {found.form}, {found.spelling}, {len(file)} tensors")
    cli.say(f"wrote      {path}: {dialect.name} names, {len(out.entries)} tensors")
    for key in out.dropped:
        cli.say(f"left out   {key}")
    for note in out.notes:
        cli.say(f"note       {note}")
    if args.json:
        result = {
            "ok": True,
            "out": str(path),
            "form": found.form,
            "model": found.model,
            "dialect": {"from": found.dialect, "to": dialect.name},
            "tensors": len(out.entries),
            "bytes": path.stat().st_size,
            "left_out": out.dropped,
            "notes": out.notes,
        }
        print(json.dumps(result, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
