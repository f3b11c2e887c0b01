"""Start the ranks of one command as processes of this machine, with gloo between them, and wait for their ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more) -> dict[str, str]:
    # What is on the path already may be where packages lie.
    paths = os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def start_ranks(size: int, *program: str, **variables) -> list[subprocess.Popen]:
    """`python program` as every rank of a world of `size`, as torchrun would start it, but each on its own."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [
        _start(program, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables}) for rank in range(size)
    ]


def _start(arguments, variables: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # In the background of a shell Ctrl-C is ignored, by its children too.
    heed = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment(**variables), cwd=ROOT, preexec_fn=heed, **pipes)


def ends(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each; one that does not end is killed, and fails the test."""
    found, end = [], time.monotonic() + timeout
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def start_torchrun(size: int, *program: str, **variables) -> subprocess.Popen:
    """`torchrun --nproc-per-node size program`."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", str(free_port())]
    return _start([*launch, *program], variables)


def torchrun(size: int, *program: str, timeout: float = 120, **variables) -> subprocess.CompletedProcess:
    """`start_torchrun`, to its end."""
    process = start_torchrun(size, *program, **variables)
    ((status, out, err),) = ends([process], timeout)
    return subprocess.CompletedProcess(process.args, status, out, err)
