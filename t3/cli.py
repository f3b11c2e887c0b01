"""What the command lines share: options, exit statuses, messages, and the writing of a clip. No torch import."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import T3Error
from .prompts import SEED_LIMIT
from .video import check_video, crop_frames, crop_rows, open_writer

INTERRUPTED = 130
BAD_INPUT = 2
UNHARMED = "interrupted; nothing half-written is left under a final name"


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Options on what a clip becomes: shared by everything that writes one."""
    group = parser.add_argument_group("output")
    group.add_argument("--fps", type=float, help="frames per second (default: 30, or what the latents say)")
    group.add_argument("--codec", choices=("h264", "h265"), help="of a video file (default: h264)")
    group.add_argument(
        "--bit-depth", type=int, choices=(8, 10, 16), default=8, help="8 or 10 for video, 8 or 16 for PNG"
    )
    group.add_argument("--crf", type=float, help="quality of the encoder, 0 best to 51 (default: 17 h264, 19 h265)")
    group.add_argument("--crop", type=int, metavar="ROWS", help="crop about the centre, e.g. 2176 rows to 2160")
    group.add_argument("--overwrite", action="store_true", help="replace output that exists")
    group.add_argument("--json", action="store_true", help="print one JSON object with the results on standard output")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise `T3Error` for steps, guidance (`cfg`), shift or a seed that no clip can be sampled with."""
    if args.steps < 1:
        raise T3Error(f"--steps is {args.steps}; use at least 1. The released setting is 50.")
    if not 1 <= args.cfg < math.inf:
        raise T3Error(f"--cfg is {args.cfg:g}; use 1 (no guidance) or more. The released setting is 5.")
    if not 0 < args.shift < math.inf:
        raise T3Error(f"--shift is {args.shift:g}; use more than 0. The released setting is 5.")
    if not 0 <= args.seed < SEED_LIMIT:
        raise T3Error(f"--seed is {args.seed}; use 0 to 2^64 - 1.")


def check_clip(path: Path | str, width: int, height: int, args: argparse.Namespace) -> None:
    """Raise `T3Error` for anything that would keep a clip of this size from being written to `path` as asked."""
    rows = height
    if args.crop is not None:
        crop_rows(height, args.crop)
        rows = args.crop
    check_video(path, width=width, height=rows, **_writer_options(args))


def write_clip(path: Path | str, pieces: Iterable, width: int, height: int, args, metadata: dict[str, Any]) -> None:
    """Write frames `[n, H, W, 3]`, piece by piece, to `path` as the options say; complete or not at all."""
    rows = args.crop or height
    with open_writer(path, width=width, height=rows, metadata=metadata, **_writer_options(args)) as writer:
        for piece in pieces:
            writer.write(crop_frames(piece, rows))


def _writer_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("fps", "codec", "bit_depth", "crf", "overwrite")
    return {name: getattr(args, name) for name in names}


class Stopwatch:
    """Seconds per named stage, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a `with` block towards `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process so far: `host`, and `device` where torch has used a CUDA card."""
    peak = {"host": _peak_host_memory()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_host_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def say(text: str) -> None:
    """One line for the person watching, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any, indent: int | None = None) -> None:
    """A result for programs, on standard output. What its encoding lacks is escaped as JSON escapes it: Windows writes
    into pipes in the encoding of the place, and bytes of a name that are no UTF-8 are in none."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    print(text)


def let_words_through() -> None:
    """Have characters that the encoding of standard output lacks escaped there, as on standard error."""
    with contextlib.suppress(AttributeError, ValueError):  # something that stands in for it, or is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def quiet_libraries() -> None:
    """Keep transformers' and diffusers' own chatter off the screen; errors stay. For command lines only."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()


def let_segments_grow() -> None:
    """Have torch's allocator of GPU memory grow the blocks it has instead of leaving holes between them. To be called
    before torch is imported; for command lines only, whose process is theirs.

    Without it a 4K run that uses 11.5 GiB fails in 16. What the user has set stays. Where torch cannot do it (Windows,
    ROCm) it would warn. This name of the variable is the one that every torch knows; the newer one goes before it.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform != "linux" or "torch" in sys.modules or any(name in os.environ for name in names):
        return
    try:
        build = version("torch")
    except PackageNotFoundError:
        return
    if "rocm" not in build:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def run(name: str, command: Callable[[], int], *, as_json: bool) -> int:
    """Run a command line's work and turn its end into an exit status.

    0: everything asked for is on disk. 1: something failed. 2: bad arguments or input. 130: interrupted.
    SIGTERM ends as an interruption does, so that temporary files are removed.
    """

    def stop(signum, frame):
        raise KeyboardInterrupt

    let_words_through()
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, stop)
    try:
        return command()
    except T3Error as error:
        return report(name, str(error), BAD_INPUT, as_json)
    except ModuleNotFoundError as error:
        if (missing := missing_package(name, error)) is None:
            raise
        return report(name, missing, BAD_INPUT, as_json)
    except KeyboardInterrupt:
        return report(name, UNHARMED, INTERRUPTED, as_json)


def missing_package(name: str, error: BaseException) -> str | None:
    """What to install where a command, `t3.NAME`, ended for want of a package of somebody else's; else None."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package, command = error.name.partition(".")[0], name.removeprefix("t3.").split()[0]
    if package == "t3":
        return None
    extra = {"retrofit": "train", "bench": "bench"}.get(command, "generate")
    return (
        f"the package {package} is not installed in {sys.executable}. In the project's folder "
        f"`python3 run.py {command}` sets up what it needs, and so does: pip install -e '.[{extra}]'"
    )


def report(name: str, message: str, status: int, as_json: bool) -> int:
    """Say why a command ended with `status`, which is returned; in JSON as well, if that was asked for."""
    say(f"{name}: {message}")
    if as_json:
        print_json({"ok": False, "error": message, "status": status})
    return status
