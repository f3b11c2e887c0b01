"""Time a prompt file on one GPU and on several, then kill a rank in the middle and run the same command again.

    python benchmarks/parallel_batch.py --gpus 1 2 --out parallel_batch.json

Clips at 4K with few frames and steps, by `t3.generate` as a user would start it: alone, or by torchrun with a clip each
(`--split data=N`). Random weights of the real sizes (Wan2.1 1.3B). For each number of GPUs: seconds from start to end,
clips an hour from when every GPU has made its first to the last, and whether every clip is there once. Last, with the
most GPUs, a rank is killed by SIGKILL when a quarter of the clips is there; the run must end, leave no half file, and
finish when it is started again. `--seconds` bounds all of it. `--tiny` tries it on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from headless_4k import machine
from keep import parse_with_out, save

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "2", "--cfg", "1"]
PATIENCE = 60.0  # for the end of a run whose rank was killed


def command(options: argparse.Namespace, model: Path, prompts: Path, out: Path, gpus: int) -> list[str]:
    """What a user would type."""
    size = TINY if options.tiny else ["--frames", str(options.frames), "--steps", str(options.steps)]
    launch = [] if gpus == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    split = [] if gpus == 1 else ["--split", f"data={gpus}"]
    clips = ["--prompts", str(prompts), "--out", str(out), "--json", *split]
    return [sys.executable, *launch, "-m", "t3.generate", "--model", str(model), *clips, *size]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """In a group of its own, so that all of it can be ended."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": paths}
    with log.open("ab") as errors:
        return subprocess.Popen(
            arguments, env=environ, stdout=subprocess.PIPE, stderr=errors, start_new_session=True, text=True
        )


def end(process: subprocess.Popen, stop: float) -> dict[str, Any]:
    """Exit status and the JSON of a run, which is ended at that time of the monotonic clock."""
    try:
        out, _ = process.communicate(timeout=max(1.0, stop - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return {"status": "stopped: it took too long"}
    found: dict[str, Any] = {"status": process.returncode}
    try:
        found["result"] = json.loads(out)
    except ValueError:
        found["printed"] = out[-500:]
    return found


def finished(out: Path) -> list[str]:
    """Clips that are there."""
    return sorted(path.name for path in out.glob("*.mp4") if not path.name.startswith("."))


def clips_an_hour(out: Path, gpus: int) -> float | None:
    """From when every GPU has made its first clip to the last one: starts are left out, and the end is not."""
    times = sorted((out / name).stat().st_mtime for name in finished(out))
    return None if len(times) <= gpus else round(3600 * (len(times) - gpus) / (times[-1] - times[gpus - 1]), 1)


def timed(
    options: argparse.Namespace, model: Path, prompts: Path, folder: Path, gpus: int, stop: float
) -> dict[str, Any]:
    """One run from nothing to all clips."""
    out = folder / f"clips-{gpus}"
    begin = time.perf_counter()
    found = end(start(command(options, model, prompts, out, gpus), folder / f"log-{gpus}.txt"), stop)
    row = {"gpus": gpus, "seconds": round(time.perf_counter() - begin, 2), "status": found["status"]}
    result = found.get("result")
    if result is None:
        return row | {"failed": (folder / f"log-{gpus}.txt").read_text(errors="replace")[-1500:]}
    if "seconds" not in result:
        return row | {"failed": result["error"]}
    row |= {"seconds_of": result["seconds"], "clips": len(finished(out)), "ok": result["ok"]}
    row["split"] = result.get("split", {}).get("mode")
    rate = clips_an_hour(out, gpus)
    row |= {} if rate is None else {"clips_an_hour": rate}
    again = end(start(command(options, model, prompts, out, gpus), folder / f"log-{gpus}.txt"), stop).get("result", {})
    row["again"] = {"already_done": again.get("already_done"), "made": len(again.get("clips", []))}
    return row


def killed(
    options: argparse.Namespace, model: Path, prompts: Path, folder: Path, gpus: int, stop: float
) -> dict[str, Any]:
    """A run whose last rank is killed, and the run after it."""
    out, log = folder / "clips-killed", folder / "log-killed.txt"
    process = start(command(options, model, prompts, out, gpus), log)
    while len(finished(out)) < max(1, options.clips // 4) and process.poll() is None and time.monotonic() < stop:
        time.sleep(0.05)
    victims = ranks_of(process.pid)
    row: dict[str, Any] = {"gpus": gpus, "case": "a rank is killed", "finished_before": len(finished(out))}
    if process.poll() is not None or not victims:
        return row | {"failed": "the run ended before a rank could be killed"}
    os.kill(victims[-1], signal.SIGKILL)
    begin, begin_of_end = time.perf_counter(), time.monotonic()
    row |= {
        "status": end(process, begin_of_end + PATIENCE)["status"],
        "seconds_to_the_end": round(time.perf_counter() - begin, 2),
    }
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("t3.generate:")]
    row |= {
        "said": said[-1].replace(platform.node(), "HOST") if said else None,
        "processes_left": len(ranks_of(process.pid)),
    }
    row["finished_then"] = len(finished(out))
    after = end(start(command(options, model, prompts, out, gpus), log), stop)
    row |= {"again_status": after["status"], "clips": len(finished(out))}
    row["left_beside"] = sorted(path.name for path in out.iterdir() if path.name not in finished(out))
    return row


def ranks_of(parent: int) -> list[int]:
    """Processes that torchrun started, in the order of their ranks."""
    import psutil

    try:
        children = psutil.Process(parent).children()
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            found.append((int(child.environ()["RANK"]), child.pid))
        except (psutil.Error, KeyError):
            continue
    return [pid for _, pid in sorted(found)]


def table(rows: list[dict[str, Any]]) -> str:
    """The timed rows as Markdown."""
    lines = [
        "| GPUs | split | s | clips | clips an hour | times one GPU |",
        "|---|---|---|---|---|---|",
    ]
    first = next((row["clips_an_hour"] for row in rows if row["gpus"] == 1 and "clips_an_hour" in row), None)
    for row in rows:
        if "clips_an_hour" in row:
            times = f"{row['clips_an_hour'] / first:.2f}" if first else ""
            cells = [row[name] for name in ("gpus", "split", "seconds", "clips", "clips_an_hour")] + [times]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything, writing what there is after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs to use (default: 1 2)")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=5, help="4n+1 (default: 5)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=190, help="for all of it (default: 190)")
    parser.add_argument("--no-kill", dest="kill", action="store_false")
    parser.add_argument("--tiny", action="store_true", help="tiny model and clips: try the script on a CPU")
    options = parse_with_out(parser)
    stop = time.monotonic() + options.seconds
    results: dict[str, Any] = {"machine": machine(), "options": vars(options) | {"out": None}, "runs": []}

    def add(row: dict[str, Any]) -> None:
        results["runs"].append(row)
        print(json.dumps(row), flush=True)
        save(options.out, results)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(f"clip number {i}" for i in range(1, options.clips + 1)) + "\n")
        # By a process of its own, which holds no card afterwards.
        device = "cuda" if not options.tiny and results["machine"]["device"] != "CPU" else "cpu"
        making = f"from headless_4k import build; build(r'{folder / 'model'}', '1.3b', '{device}', {options.tiny})"
        subprocess.run([sys.executable, "-c", making], cwd=ROOT / "benchmarks", check=True)
        for gpus in options.gpus:
            add(timed(options, folder / "model", prompts, folder, gpus, stop))
        if options.kill and max(options.gpus) > 1:
            last = results["runs"][-1]["seconds"]
            # Until a quarter is there, and the rest, each with a start.
            if time.monotonic() + 1.6 * last < stop:
                add(killed(options, folder / "model", prompts, folder, max(options.gpus), stop))
            else:
                add({"gpus": max(options.gpus), "case": "a rank is killed", "failed": "not run: no time was left"})
    print(table(results["runs"]), flush=True)


if __name__ == "__main__":
    main()
