"""`t3.generate` on one rank, with a fault built in; run by `test_parallel_faults` and `parallel_faults`.

Arguments: the fault, or "none"; its rank, or "all"; then those of `t3.generate`.
"""

import os
import signal
import sys
import time

import t3
from t3 import generate
from t3.parallel import world


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_second_clip(work):
    """`work`, which kills its process when it is called for the second clip."""
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            kill()
        return work(*args, **kwargs)

    return broken


def sampling() -> None:
    from t3.pipeline import Engine

    Engine.sample = in_second_clip(Engine.sample)


def decode() -> None:
    from t3 import decoder

    decoder.help_decode = in_second_clip(decoder.help_decode)


def writing() -> None:
    from t3 import jobs

    def broken(path, pieces, *args):
        next(iter(pieces))
        path.with_name(f".{path.name}.tmp").write_bytes(b"half")
        kill()

    jobs.write_clip = broken


def error() -> None:
    from t3.pipeline import Engine

    def broken(engine, clip):
        raise RuntimeError("the card fell off the bus")

    Engine.sample = broken


def deaf() -> None:
    """Rank 1 dies while all others wait in a library that does not listen to Python's signals."""
    import ctypes

    from t3.pipeline import Engine

    def broken(engine, clip):
        if os.environ["RANK"] == "1":
            time.sleep(1)
            kill()
        ctypes.CDLL(None).sleep(100)

    Engine.sample = broken


def slow() -> None:
    """Says that it samples, and does so for a long time."""
    from t3.pipeline import Engine

    def broken(engine, clip):
        print(f"sampling in process {os.getpid()}.", file=sys.stderr, flush=True)
        time.sleep(100)

    Engine.sample = broken


def version() -> None:
    t3.__version__ = "0.0.0"


def nccl() -> None:
    """A torch without NCCL, as there is for Windows."""
    import torch.distributed

    torch.distributed.is_nccl_available = lambda: False


def absent() -> None:
    sys.exit(0)


def main(fault: str, rank: str, *arguments: str) -> int:
    if fault != "none" and (os.environ["RANK"] == rank or rank == "all"):
        {f.__name__: f for f in (sampling, decode, writing, error, deaf, slow, version, nccl, absent)}[fault]()
    if fault == "absent":
        start = world.World.start
        world.World.start = lambda self, device: start(self, device, join_seconds=3)
    return generate.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
