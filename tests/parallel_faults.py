"""Faults on real cards: `t3.generate` on two ranks, started by torchrun, with one thing wrong at a time.

    python tests/parallel_faults.py --out parallel_faults_2.json

Each case runs the embedded model at a small size in a folder of its own, several at once. Of each: the exit status, the
line on the screen, seconds, processes that are still there afterwards, files under final names and whether each is
whole, and what else is left. Ends with 1 where a case is not as it should be. `--cpu` takes gloo on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from parallel_fixtures import ROOT, TESTS, environment, free_port

PATIENCE = 80.0
SMALL = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "2", "--cfg", "2", "--json"]


@dataclass(frozen=True)
class Case:
    """What is wrong, on which rank, and what is to be: torchrun's status, words said, and files under final names."""

    name: str
    fault: str
    rank: str
    split: str
    status: int
    words: str
    files: tuple[str, ...]
    processes: int = 2
    cards_only: bool = False


CASES = [
    Case("nothing is wrong", "none", "all", "sequence=2", 0, "wrote ", ("0001-one.mp4", "0002-two.mp4")),
    Case("killed in sampling", "sampling", "1", "sequence=2", 1, "rank 1: process", ("0001-one.mp4",)),
    Case("rank 0 killed in sampling", "sampling", "0", "guidance=2", 1, "rank 0: process", ("0001-one.mp4",)),
    Case("killed in decode", "decode", "1", "guidance=2", 1, "rank 1: process", ("0001-one.mp4", "0002-two.latent")),
    Case("killed in writing", "writing", "0", "sequence=2", 1, "rank 0: process", ("0001-one.latent",)),
    Case("waits in a library", "deaf", "all", "guidance=2", 1, "rank 1: process", ()),
    Case("wrong number of processes", "none", "all", "sequence=3", 1, "3 processes (3), and 2 were started", ()),
    Case("more processes than cards", "none", "all", "auto", 1, "CUDA card", (), processes=0, cards_only=True),
    Case("no NCCL", "nccl", "all", "auto", 1, "without NCCL", (), cards_only=True),
]


def measure(case: Case, folder: Path, device: str, cards: int) -> dict[str, Any]:
    """Run a case to its end, and see what is left."""
    folder.mkdir()
    prompts, out, log = folder / "prompts.txt", folder / "out", folder / "screen.txt"
    prompts.write_text("one\ntwo\n", encoding="utf-8")
    count = case.processes or cards + 1
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
    program = [str(TESTS / "parallel_generate.py"), case.fault, case.rank, *SMALL, "--device", device]
    program += ["--prompts", str(prompts), "--out", str(out), "--split", case.split]
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as screen, (folder / "result.json").open("w", encoding="utf-8") as result:
        process = subprocess.Popen(
            [sys.executable, *launch, *program], stdout=result, stderr=screen, env=environment(), start_new_session=True
        )
        try:
            status: Any = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = f"still there after {PATIENCE:g} s"
    seconds = time.monotonic() - begin
    # torchrun may end a moment before its children are gone.
    time.sleep(1.0)
    orphans = of_folder(folder)
    for pid in orphans:
        psutil.Process(pid).kill()
    text = nobodys(log.read_text(encoding="utf-8", errors="replace").replace(str(folder), "FOLDER"))
    there = sorted(out.iterdir()) if out.exists() else []
    final = [path for path in there if not path.name.startswith(".")]
    row = {
        "case": case.name,
        "status": status,
        "said": [line.strip()[:400] for line in text.splitlines() if case.words in line],
        "took_s": round(seconds, 1),
        "orphans": len(orphans),
        "files": [path.name for path in final],
        "half_files": [path.name for path in final if not whole(path)],
        "hidden": [path.name for path in there if path not in final],
    }
    row["as_it_should_be"] = (
        (status, row["files"], orphans, row["half_files"]) == (case.status, list(case.files), [], [])
        # Once, and not by every rank; of what was made, each.
        and len(row["said"]) == (1 if case.status else 2)
    )
    if not row["as_it_should_be"]:
        row["log"] = text[-3000:]
    return row


def nobodys(text: str) -> str:
    """The same without names of the machine and of its folders: results are kept, and are to say nothing of either."""
    for name in filter(None, {platform.node(), socket.gethostname(), socket.getfqdn()}):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "HOST", text)
    text = text.replace(f"{ROOT}{os.sep}", "")
    # Of an absolute path of any system the last part; addresses of the web have theirs after a name.
    text = re.sub(r"(?<![\w/:.])(?:/[\w.@+~-]+)+/(?=[\w.@+~-])", ".../", text)
    return re.sub(r"\b[A-Za-z]:\\(?:[^\\\s\"']+\\)*", ".../", text)


def of_folder(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


def whole(path: Path) -> bool:
    """Whether a clip or latents can be read to their end."""
    try:
        if path.suffix == ".latent":
            from t3.latents import load_latents

            return load_latents(path)[0].numel() > 0
        import av

        with av.open(str(path)) as file:
            return sum(1 for _ in file.decode(video=0)) == 5
    except Exception:
        return False


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all cases."""
    lines = ["| case | status | said | s | orphans | files | half | hidden | as it should be |", "|" + "---|" * 9]
    for row in rows:
        said = row["said"][0] if row["said"] else ""
        cells = [row["case"], row["status"], said, row["took_s"], row["orphans"], ", ".join(row["files"])]
        cells += [", ".join(row["half_files"]), ", ".join(row["hidden"]), row["as_it_should_be"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run all cases; returns 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo on CPUs, even where there are cards")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="those whose names have one of these words")
    parser.add_argument("--at-once", type=int, default=3, help="cases (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from t3.bench.machine import machine

    cards = 0 if args.cpu else torch.cuda.device_count()
    cases = [case for case in CASES if cards or not case.cards_only]
    cases = [case for case in cases if not args.cases or any(word in case.name for word in args.cases)]
    device = "cuda" if cards else "cpu"
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.at_once) as pool:
        folders = [Path(temporary) / str(number) for number in range(len(cases))]
        rows = list(pool.map(lambda case, folder: measure(case, folder, device, cards), cases, folders))
    result = {"machine": {**machine(torch.device(device)), "ranks": 2}, "rows": rows}
    print(table(rows), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["as_it_should_be"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
