"""`python -m t3.inspect`: what a file of weights is, read from its header."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli
from .errors import T3Error
from .weights import Identity, WeightFile, identify, open_weights


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.inspect`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.inspect",
        description="Say what a file of weights is: model, form, dialect of its names, T3 metadata, and every key that "
        "has no place. Only headers are read, whatever the size of the file.",
        epilog="exit status: 0 every key has its place; 2 the file cannot be read or used, and the output says why",
    )
    parser.add_argument("file", type=Path, help="safetensors file, index or folder; GGUF files are recognised")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run("t3.inspect", lambda: _inspect(args), as_json=False)


def _inspect(args: argparse.Namespace) -> int:
    try:
        file = open_weights(args.file)
        facts = weight_facts(file, identify(file))
    except T3Error as error:
        facts = _nothing_known(args.file, str(error))
    if args.json:
        cli.print_json(facts, indent=2)
    else:
        for line in fact_lines(facts):
            print(line)
    return 0 if facts["ok"] else cli.BAD_INPUT


def weight_facts(file: WeightFile, found: Identity) -> dict[str, Any]:
    """What is known of a file, as plain data."""
    t3 = found.t3
    return {
        "ok": found.problem is None,
        "file": str(file.path),
        "form": found.form,
        "dialect": found.dialect,
        "model": found.model,
        "matched": len(found.matched),
        "unused": len(found.unused),
        "refused": len(found.refused),
        "plan": json.loads(found.plan) if found.plan else None,
        "component": found.component,
        "kind": found.kind,
        "width": found.width,
        "what": found.what,
        "spelling": found.spelling,
        "prefix": found.prefix,
        "naming": found.naming,
        "tuned": found.tuned,
        "trained_grid": t3.trained_grid,
        "base": t3.base and t3.base.describe(),
        "rank": t3.rank,
        "writer": t3.writer,
        "t3": t3.describe(),
        "parameters_changed": len({piece.target for piece in found.adapter.pieces}) if found.adapter else None,
        "container": file.container,
        "stored_as": dict(Counter(file.dtype(key) for key in file).most_common()),
        "bytes": file.nbytes,
        "headless": found.problem is None and found.elsewhere is None,
        "elsewhere": found.elsewhere,
        "problem": found.problem,
        "notes": found.notes,
        "unused_keys": found.unused,
        "refused_keys": found.refused,
    }


def _nothing_known(path: Path, problem: str) -> dict[str, Any]:
    """The same fields for a file that cannot be read at all."""
    unknown = dict.fromkeys(("form", "dialect", "model", "component", "kind"), "unknown")
    counts = dict.fromkeys(("matched", "unused", "refused"), 0)
    rest: dict[str, Any] = {"plan": None, "tuned": "cannot tell", "headless": False, "problem": problem, "notes": []}
    return {"ok": False, "file": str(path), **unknown, **counts, **rest, "unused_keys": [], "refused_keys": {}}


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """`weight_facts` for people."""
    lines = [f"file       {facts['file']}"]
    if facts["model"] != "unknown" or facts["matched"]:
        lines += _known_lines(facts)
    lines += [f"note       {note}" for note in facts["notes"]]
    lines += [f"unused     {key}" for key in facts["unused_keys"]]
    lines += [f"refused    {key}: {reason}" for key, reason in facts["refused_keys"].items()]
    if facts["problem"]:
        lines.append(f"PROBLEM    {facts['problem']}")
    return lines


_FORMS = {
    "full": "a whole model",
    "lora": "LoRA",
    "dora": "DoRA",
    "lokr": "LoKr",
    "loha": "LoHa",
    "diff": "differences, to be added",
    "set": "replaced weights",
}


def _known_lines(facts: dict[str, Any]) -> list[str]:
    form = " and ".join(_FORMS.get(part, part) for part in facts["form"].split("+"))
    lines = [f"model      {facts['what']} ({facts['component']})", f"form       {form}"]
    if facts["parameters_changed"] is not None:
        lines[-1] += f", onto {facts['parameters_changed']} parameters"
    stored = ", ".join(f"{count} {dtype}" for dtype, count in facts["stored_as"].items())
    lines.append(f"names      {facts['spelling']}")
    lines.append(f"stored as  {facts['container']}: {stored}; {facts['bytes'] / 2**20:,.1f} MiB")
    lines.append(f"keys       {facts['matched']} matched, {facts['unused']} unused, {facts['refused']} refused")
    alike = "" if facts["plan"] else " (it carries no plan; tuned and stock weights look alike)"
    lines.append(f"T3-tuned   {facts['tuned']}{alike}")
    lines += [f"           {line}" for line in facts["t3"]]
    if facts["elsewhere"]:
        lines.append(f"headless   no: {facts['elsewhere']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
