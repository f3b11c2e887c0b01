"""The processes that share one decode or encode, on groups of torch.distributed, and what they tell each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import T3Error

_Found = TypeVar("_Found")


class RankLost(RuntimeError):
    """Another process of the group is gone, so that what it held cannot come."""


class Ranks:
    """A group of processes and this one's place in it.

    Tensors of a GPU go by NCCL, those of main memory by gloo, which notices at once that a process died, where NCCL
    would wait. Rank 0 of the group is the one that gets results and writes files.
    """

    def __init__(self, group: Any = None) -> None:
        """group: of torch.distributed, the default one if None. All its processes must call this together."""
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.wire = self.group
        if "cpu:" not in dist.get_backend_config(self.group):
            everyone = dist.get_process_group_ranks(self.group)
            self.wire = dist.new_group(everyone, backend="gloo", use_local_synchronization=True)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def meet(self) -> None:
        """Wait until every process is here. Raises RankLost as soon as one is gone."""
        with self._whole():
            dist.all_reduce(torch.zeros(1), group=self.wire)

    def share(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of rank `source`, on every rank, written into `tensor`, whose numbers lie close together.

        Every process calls it with a tensor of the same shape, dtype and layout, on its own device.
        """
        data, group = as_bytes(tensor), self.wire if tensor.device.type == "cpu" else self.group
        with self._whole():
            dist.broadcast(data, group=group, group_src=source)
        return tensor

    def words(self, said: Any) -> list[Any]:
        """What every rank says, in order: any small object that can be pickled."""
        heard: list[Any] = [None] * self.size
        with self._whole():
            dist.all_gather_object(heard, said, group=self.wire)
        return heard

    def agree(self, check: Callable[[], _Found]) -> list[_Found]:
        """What `check()` gives on every rank, in order. Raises the first `T3Error` of any of them on all of them."""
        try:
            said: tuple[str | None, Any] = None, check()
        except T3Error as error:
            said = str(error), None
        heard = self.words(said)
        for fault, _ in heard:
            if fault is not None:
                raise T3Error(fault)
        return [found for _, found in heard]

    def send(self, tensor: torch.Tensor) -> None:
        """To rank 0, from main memory; its numbers may be written over afterwards."""
        data = as_bytes(tensor)
        with self._whole():
            dist.send(data, group=self.wire, group_dst=0)

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """What rank `source` sends, into a tensor in main memory."""
        data = as_bytes(tensor)
        with self._whole():
            dist.recv(data, group=self.wire, group_src=source)
        return tensor

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # The first line names what happened; the others are a C++ trace.
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RankLost(
                f"{self}: another process is gone or cannot be reached, so this one ends too ({why[:200]}). What that "
                "process said last tells why; if it was killed, look for a lack of main memory."
            ) from error


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor whose numbers lie close together, in whatever order, as bytes: every group takes those."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(-1).view(torch.uint8)
