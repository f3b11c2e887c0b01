"""`python -m t3.convert`: weights under the names of another dialect, or a model with other weights merged into it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import __version__, cli
from .adapters import Adapter
from .errors import T3Error
from .plan import PRESETS, Plan
from .plan_choice import resolve_plan
from .sources import Sources, find_merge
from .weights import ApplyReport, Identity, T3Metadata, WeightFile, identify, open_weights
from .weights.fingerprint import fingerprint
from .weights.merge import MergedFile
from .weights.metadata import KEYS
from .weights.peft_settings import SETTINGS_FILE
from .weights.respell import Respelled, as_it_is, respell
from .weights.spelling import DIALECTS, Dialect, dialect_of
from .weights.write import Entry, write_safetensors


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.convert",
        description="Write weights (a whole model, a LoRA, LoKr, LoHa, DoRA or difference) under the names of another "
        "dialect. Values stay as they are and metadata is kept. With --t3-weights or --lora: write a whole transformer "
        "of any kind with these applied, as t3.generate applies them. Memory for a few tensors is enough.",
        epilog="exit status: 0 the file is on disk; 1 something failed; 2 bad arguments or input; 130 interrupted",
    )
    parser.add_argument("file", type=Path, help="safetensors file, index, or folder that holds one set of weights")
    parser.add_argument(
        "--to", choices=list(DIALECTS), help="dialect to write (where weights are merged, default: that of the file)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=".safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace output that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the results on standard output")
    group = parser.add_argument_group("merging", "T3 weights first, then the others, each in the order given")
    group.add_argument(
        "--t3-weights",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="T3-tuned weights: a full checkpoint, difference or LoRA (repeatable)",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="any other LoRA, LoKr, LoHa, DoRA or difference (repeatable)",
    )
    group.add_argument(
        "--plan",
        default="auto",
        help=f"plan to write into the merged file: {', '.join(PRESETS)}, a JSON file, none, or auto: what the files "
        "carry, else what the model does (default)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run("t3.convert", lambda: _convert(args), as_json=args.json)


def _convert(args: argparse.Namespace) -> int:
    merging = bool(args.t3_weights or args.lora)
    dialect = dialect_of(args.to) if args.to else None
    if not merging and (dialect is None or args.plan != "auto"):
        missing = "--plan is for merged files" if args.plan != "auto" else f"--to is missing ({', '.join(DIALECTS)})"
        raise T3Error(
            f"{missing}. A file alone is written under other names, which --to says; with --t3-weights or --lora these "
            "are merged into it."
        )
    if args.out.suffix.lower() != ".safetensors":
        raise T3Error(f"--out {args.out} must end in .safetensors, so that programs know what it is.")
    if dialect and dialect.name == "peft" and (args.out.parent / SETTINGS_FILE).exists():
        raise T3Error(
            f"{args.out.parent} holds an {SETTINGS_FILE}, whose alpha would scale the new file a second time. "
            "Choose another folder."
        )
    return _merge(args, dialect) if merging else _respell(args, dialect)


def _respell(args: argparse.Namespace, dialect: Dialect | None) -> int:
    assert dialect is not None
    file = open_weights(args.file)
    found = identify(file)
    out = respell(file, found, dialect)
    _say_read(args, file, found)
    return _write(args, found, out, dialect.name, {})


def _merge(args: argparse.Namespace, dialect: Dialect | None) -> int:
    sources = find_merge(args.file, args.t3_weights, args.lora)
    applied = (*sources.t3_weights, *sources.loras)
    plan, why = _plan(args.plan, sources)
    base = open_weights(args.file)
    found = identify(base)
    file = MergedFile(base, found, [(open_weights(adapter.path), adapter.strength) for adapter in applied])
    out = respell(file, found, dialect) if dialect else Respelled(as_it_is(file), file.metadata)
    if file.changed or args.plan != "auto":
        out.metadata = _metadata(out.metadata, base, found, applied, plan)
    out.notes += [*file.notes, *_notes(args, sources, file, found, plan)]
    _say_read(args, base, found)
    for adapter, step in zip(applied, file.steps, strict=True):
        cli.say(f"applied    {adapter.path.name}: {step.report.describe()}")
    cli.say(f"plan       {plan.name!r}, {why}" if plan else f"plan       none: {why}")
    out.entries = list(_told(out.entries))
    result = {
        "applied": [_applied(adapter, step.report) for adapter, step in zip(applied, file.steps, strict=True)],
        "changed": len(file.changed),
        "unchanged": len(found.names) - len(file.changed),
        "plan": json.loads(plan.to_json()) if plan else None,
        "plan_why": why,
        "used_up": file.used_up,
    }
    return _write(args, found, out, dialect.name if dialect else found.dialect, result)


def _plan(asked: str, sources: Sources) -> tuple[Plan | None, str]:
    """The plan to write, and why. A plan that nobody states is not made up: it would say that the weights are tuned."""
    if asked == "none":
        return None, "as asked"
    if asked == "auto" and sources.plan_json is None:
        return None, "no file carries one"
    return resolve_plan(asked, sources)


def _metadata(
    kept: dict[str, str], base: WeightFile, found: Identity, applied: Sequence[Adapter], plan: Plan | None
) -> dict[str, str]:
    """The new file's metadata: the base's, with T3 entries of its own."""
    carriers = [adapter.identity.t3 for adapter in applied if adapter.strength] + [found.t3]
    grid = next((t3.grid for t3 in carriers if plan is not None and t3.plan == plan), None)
    mark = fingerprint(found.model, found.names, lambda name: base.read(found.names[name]))
    t3 = T3Metadata(plan=plan, grid=grid, base=mark, writer=f"t3.convert {__version__}")
    return {key: value for key, value in kept.items() if key not in KEYS} | t3.to_header()


def _notes(
    args: argparse.Namespace, sources: Sources, file: MergedFile, found: Identity, plan: Plan | None
) -> list[str]:
    notes = []
    if not file.changed:
        notes.append("every file is at strength 0: the tensors are those of the base, bit for bit")
    for adapter in (*sources.t3_weights, *sources.loras):
        if not adapter.strength and adapter.identity.t3.plan not in (None, plan):
            notes.append(f"{adapter.path.name} is at strength 0, so the plan it carries is not written")
    if plan is None and sources.t3_weights and args.plan != "none" and file.changed:
        notes.append(
            "none of the files carries a plan, so the merged file will not say what windows it was tuned for; --plan "
            "writes one"
        )
    moved = args.out.absolute().parent != file.folder.absolute()
    if moved and not found.strange_config and "_class_name" in file.sibling_config():
        notes.append("programs that read the config.json beside the base need a copy of it beside the new file")
    return notes


def _told(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The same entries, that say how far the file is."""
    total, done = sum(entry.nbytes for entry in entries), 0

    def telling(entry: Entry) -> Entry:
        def pieces() -> Iterator[bytes]:
            nonlocal done
            yield from entry.pieces()
            before, done = done, done + entry.nbytes
            if 10 * before // total < 10 * done // total:
                cli.say(f"[{100 * done // total} %] {entry.name}")

        return dataclasses.replace(entry, pieces=pieces)

    return map(telling, entries)


def _applied(adapter: Adapter, report: ApplyReport) -> dict[str, Any]:
    return {
        "file": str(adapter.path),
        "strength": adapter.strength,
        "form": report.form,
        "dialect": report.dialect,
        "matched": report.matched,
        "unused": report.unused,
        "changed": len(report.changed),
        "plan": report.t3.plan.name if report.t3.plan else None,
        "notes": report.notes,
    }


def _say_read(args: argparse.Namespace, file: WeightFile, found: Identity) -> None:
    cli.say(f"read       {args.file}: {found.what}, {found.form}, {found.spelling}, {len(file)} tensors")


def _write(args: argparse.Namespace, found: Identity, out: Respelled, names: str, more: dict[str, Any]) -> int:
    """Write the new file, and say so to people and, if asked for, to programs."""
    path = write_safetensors(args.out, out.entries, out.metadata, overwrite=args.overwrite)
    cli.say(f"wrote      {path}: {names} names, {len(out.entries)} tensors")
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
            "dialect": {"from": found.dialect, "to": names},
            "tensors": len(out.entries),
            "bytes": path.stat().st_size,
            "left_out": out.dropped,
            "notes": out.notes,
            **more,
        }
        cli.print_json(result, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
