"""The processes that run one command: which of them this is, how they find each other, what they tell each other.

torchrun starts them and says who they are in the environment. Without it there is one process, and nothing here waits,
connects or imports torch.distributed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..cli import say
from ..errors import T3Error

if TYPE_CHECKING:
    import torch

    from .faults import Watch

# A machine that is slow to import torch must not be taken for one that never comes.
JOIN_SECONDS = 300.0
# A collective waits as long as the slowest rank works in between, minutes at 4K; who is gone is noticed by `faults`.
COLLECTIVE = timedelta(hours=1)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass
class World:
    """`rank` of `size` processes, `local_rank` of the `local_size` on this machine.

    device, backend: None until `start`; then the torch device of this rank, and `nccl` or `gloo` (None for one
    process). name: of the command, on the screen.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device | None = None
    backend: str | None = None
    watch: Watch | None = None
    name: str = "t3"
    _store: Any = None
    _told: int = 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> World:
        """What torchrun's variables say; one process without them. Raises `T3Error` where they do not make sense."""
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls()
        values = {}
        for name in _VARIABLES:
            usual = {"LOCAL_RANK": environ.get("RANK"), "LOCAL_WORLD_SIZE": environ.get("WORLD_SIZE")}.get(name)
            text = environ.get(name, usual)
            if text is None or not text.isdecimal():
                raise T3Error(
                    f"{name} is {text!r} in the environment, and the other variables of torchrun are there. Start with "
                    "`torchrun --nproc-per-node N -m t3.generate ...`, or unset RANK and WORLD_SIZE for one process."
                )
            values[name] = int(text)
        for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
            if values[part] >= values[whole]:
                raise T3Error(
                    f"{part} is {values[part]} and {whole} is {values[whole]}: ranks count from 0 to "
                    f"{max(values[whole] - 1, 0)}. Let torchrun set them."
                )
        rank, size, local_rank, local_size = (values[name] for name in _VARIABLES)
        return cls(rank, size, local_rank, local_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """One line for the person watching, once, by whatever rank it is called on."""
        if self.is_first:
            say(text)

    def start(
        self,
        device: str = "auto",
        command: Sequence[str] | None = None,
        join_seconds: float = JOIN_SECONDS,
    ) -> World:
        """Find the other ranks, compare versions and command lines with theirs, and start torch.distributed.

        device: `auto`, `cuda` or `cpu`; each rank takes the card of its local rank. command: what must be equal on all
        ranks, the command line if None. For one process nothing is done: it may use any device.
        Raises `T3Error` where a rank is missing or different, or the machine has fewer cards than ranks, or no NCCL.
        """
        if self.size == 1 or self._store is not None:
            return self
        import torch
        import torch.distributed as dist

        self.device = self._own_device(device)
        self.backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # What is sent while a card computes must not wait until all that is queued there has begun.
            os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        if self._one_machine():
            # Ranks of one machine reach each other even where the host's name leads nowhere.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        # torchrun's own process holds what all share, or else rank 0.
        holds = self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store = self._find(dist, join_seconds, holds)
        hello = self._hello(sys.argv[1:] if command is None else command)
        self._store.set(f"hello/{self.rank}", json.dumps(hello))
        everyone = self._everyone(join_seconds)
        from .faults import Watch

        # A connection of its own: a main thread that waits in the store must not keep the watch from it.
        self.watch = Watch(self, self._find(dist, join_seconds, False), everyone)
        self.watch.start()
        _compare(everyone)
        # gloo beside NCCL, for what lies in main memory.
        both = "cpu:gloo,cuda:nccl" if self.backend == "nccl" else "gloo"
        dist.init_process_group(both, store=self._store, rank=self.rank, world_size=self.size, timeout=COLLECTIVE)
        return self

    def share(self, value: Any = None, source: int = 0) -> Any:
        """The `value` that rank `source` gave, on every rank; a value that JSON can hold. All ranks must call this."""
        if self.size == 1:
            return value
        key = f"shared/{self._next()}"
        if self.rank == source:
            self.tell(key, value)
            return value
        return self.hear(key)

    def gather(self, value: Any, seconds: float | None = None) -> list[Any]:
        """Every rank's `value` in their order, on every rank. All ranks must call this.

        seconds: to wait for a rank at most; `TimeoutError` then.
        """
        if self.size == 1:
            return [value]
        number = self._next()
        self.tell(f"gathered/{number}/{self.rank}", value)
        return [self.hear(f"gathered/{number}/{rank}", seconds) for rank in range(self.size)]

    def tell(self, key: str, value: Any) -> None:
        """Leave a value that JSON can hold under a name, for ranks that `hear` it."""
        self._store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float | None = None) -> Any:
        """What was told under that name, as soon as it is: waits for as long as all ranks live, or `seconds`."""
        pause, begin = 0.002, time.monotonic()
        while not self._store.check([key]):
            if seconds is not None and time.monotonic() - begin > seconds:
                raise TimeoutError(f"{key} was not told within {seconds:g} seconds")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return json.loads(self._store.get(key))

    def close(self) -> None:
        """This rank is done: the others need not miss it. Rank 0 leaves last, since the others may ask its store."""
        if self._store is None:
            return
        import torch.distributed as dist

        if self.is_first:
            for rank in range(1, self.size):
                self.hear(f"done/{rank}")
        assert self.watch is not None
        # Before it is told: the store may go with rank 0.
        self.watch.stop()
        self.tell(f"done/{self.rank}", True)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def _next(self) -> int:
        self._told += 1
        return self._told

    def _own_device(self, name: str) -> torch.device:
        import torch
        import torch.distributed as dist

        if not dist.is_available():
            raise T3Error("this torch has no torch.distributed. Start one process per card instead, with --shard.")
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            return torch.device("cpu")
        if name != "cuda":
            raise T3Error(
                f"--device {name} with {self.size} processes: each takes the card of its own number. "
                "Use --device cuda, or cpu."
            )
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cards < self.local_size:
            raise T3Error(
                f"{self.local_size} processes were started on this machine, and it has {cards} CUDA "
                f"card{'' if cards == 1 else 's'}: "
                + (f"use --nproc-per-node {cards}." if cards else "use --device cpu, or a machine with cards.")
            )
        if not dist.is_nccl_available():
            raise T3Error(
                "this torch was built without NCCL, which moves data between cards (there is none for Windows). Start "
                "one process per card instead, with CUDA_VISIBLE_DEVICES and --shard."
            )
        return torch.device("cuda", self.local_rank)

    def _one_machine(self) -> bool:
        return self.local_size == self.size

    def _find(self, dist: Any, seconds: float, holds: bool) -> Any:
        """A connection to the store that all ranks share; holds: it is to be kept by this process.

        Raises `T3Error` where the process that keeps it cannot be reached.
        """
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        try:
            if not host or not port.isdecimal():
                raise ValueError("they are not both set")
            wait = timedelta(seconds=seconds)
            store = dist.TCPStore(host, int(port), is_master=holds, timeout=wait, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            raise T3Error(
                f"rank {self.rank} of {self.size} cannot reach MASTER_ADDR {host!r}, MASTER_PORT {port!r} "
                f"({_first_line(error)}). Let torchrun set them, and on several machines give --rdzv-endpoint "
                "HOST:PORT that all of them reach."
            ) from None
        # A restarted run must not find what the former one left.
        return dist.PrefixStore(f"t3/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _hello(self, command: Sequence[str]) -> dict[str, Any]:
        import torch

        from .. import __version__

        return {
            "host": platform.node(),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "versions": {
                "t3": __version__,
                "torch": torch.__version__,
                "diffusers": _diffusers_version(),
                "device": self.device.type if self.device else "",
            },
            "command": list(command),
        }

    def _everyone(self, seconds: float) -> list[dict[str, Any]]:
        end = time.monotonic() + seconds
        names = [f"hello/{rank}" for rank in range(self.size)]
        while missing := [rank for rank, name in enumerate(names) if not self._store.check([name])]:
            if time.monotonic() > end:
                raise T3Error(
                    f"{self.size} processes were announced, and rank{'s' if len(missing) > 1 else ''} "
                    f"{', '.join(map(str, missing))} did not come within {seconds:g} seconds. Start as many as "
                    f"WORLD_SIZE says ({self.size}; {self.size - len(missing)} are here), or let torchrun start them."
                )
            time.sleep(0.05)
        return [json.loads(self._store.get(name)) for name in names]


def _diffusers_version() -> str:
    """Of its metadata, since to import it takes seconds; of itself where it was put there without any."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diffusers")
    except PackageNotFoundError:
        import diffusers

        return diffusers.__version__


def _compare(everyone: list[dict[str, Any]]) -> None:
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differ = [name for name, value in first["versions"].items() if other["versions"].get(name) != value]
        if differ:
            raise T3Error(
                "mixed versions: "
                + "; ".join(
                    f"rank {rank} on {other['host']} has {name} {other['versions'].get(name)}, rank 0 on "
                    f"{first['host']} has {first['versions'][name]}"
                    for name in differ
                )
                + ". Results would differ from rank to rank: install the same versions on all machines."
            )
        if other["command"] != first["command"]:
            raise T3Error(
                f"rank {rank} was started with {' '.join(other['command'])!r}, and rank 0 with "
                f"{' '.join(first['command'])!r}: start all with the same command line."
            )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
