"""From clips to the tensors of a step: which clips, at what noise, on this process; read ahead if they lie on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .conditioning import put
from .config import Stage
from .data import Clips, Layout, Order, Pool, drawn
from .draws import QUERIES, generator, noise, noise_level, sample_draws
from .objectives import Batch

_AHEAD = 2  # batches that are read while one is trained on


@dataclass(frozen=True)
class _Round:
    """One round of all processes: its clips, and the number of the first, counted over the run."""

    pool: Pool
    numbers: list[int]
    serial: int
    stage: Stage


class Feeder:
    """Batches without end. `state()` and `restore()`: where it is, so that a run goes on with the very next one."""

    def __init__(
        self,
        clips: Clips,
        layout: Layout,
        *,
        seed: int,
        caption_dropout: float,
        patch: tuple[int, ...],
        device: torch.device,
        resident: bool,
    ) -> None:
        self.order = Order(clips.pools, seed, layout)
        self.layout = layout
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.patch = patch
        self.device = device
        self.resident = resident
        self.serial = 0
        self.conditioning = clips.conditioning
        self.empty = None if clips.empty is None else clips.empty.to(device)
        self._reader = None if resident else ThreadPoolExecutor(1, thread_name_prefix="clips")
        self._ahead: deque[tuple[dict[str, Any], _Round, Future]] = deque()
        if resident:
            for pool in clips.pools:
                pool.settle(device)

    def next(self, stage: Stage) -> Batch:
        """The next batch of this process under `stage`."""
        if self._reader is None:
            planned = self._plan(stage)
            return self._finish(planned, self._read(planned))
        if self._ahead and self._ahead[0][1].stage != stage:
            self.restore(self.state())
        while len(self._ahead) < _AHEAD + 1:
            state, planned = self._here(), self._plan(stage)
            self._ahead.append((state, planned, self._reader.submit(self._read, planned)))
        _, planned, future = self._ahead.popleft()
        return self._finish(planned, future.result())

    def pools(self, stage: Stage) -> list[Pool]:
        """The pools that a stage draws from."""
        return drawn(self.order.pools, stage.mix)

    def example(self, pool: Pool, stage: Stage) -> Batch:
        """A batch from this pool that is no part of the run."""
        numbers = [i % len(pool.clips) for i in range(pool.each(self.layout.batch) * self.layout.processes)]
        planned = _Round(pool, numbers, 0, stage)
        return self._finish(planned, self._read(planned))

    def state(self) -> dict[str, Any]:
        """Plain data; what was read ahead does not count."""
        return self._ahead[0][0] if self._ahead else self._here()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._ahead.clear()
        self.serial = state["serial"]
        self.order.restore(state["order"])

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _here(self) -> dict[str, Any]:
        return {"serial": self.serial, "order": self.order.state()}

    def _plan(self, stage: Stage) -> _Round:
        pool, numbers = self.order.next(stage.mix)
        planned = _Round(pool, numbers, self.serial, stage)
        self.serial += len(numbers)
        return planned

    def _read(self, planned: _Round) -> dict[str, torch.Tensor]:
        each = planned.pool.each(self.layout.batch)
        first = self.layout.rank * each
        return planned.pool.take(planned.numbers[first : first + each], self.device)

    def _finish(self, planned: _Round, read: dict[str, torch.Tensor]) -> Batch:
        latents, text = read["latents"], read["text"]
        each = planned.pool.each(self.layout.batch)
        stage, first = planned.stage, planned.serial + self.layout.rank * each
        draws = [sample_draws(self.seed, serial) for serial in range(first, first + each)]
        levels = [noise_level(d, stage.noise, stage.shift, stage.sigma_min, stage.sigma_max) for d in draws]
        dropped = [d.drop < self.caption_dropout for d in draws]
        if any(dropped) and self.empty is not None:
            text = torch.where(self._put(dropped)[:, None, None], self.empty, text)
        seeds = [d.noise for d in draws]
        grey = planned.pool.grey(self.device) if self.conditioning.takes_grey else None
        given = self.conditioning.given(read, grey, [self.conditioning.choose(d.condition) for d in draws])
        drawn = noise(seeds, latents.shape[1:], self.device)
        return Batch(latents, text, drawn, self._put(levels), self._rows(planned), given)

    def _rows(self, planned: _Round) -> torch.Tensor | None:
        """Tokens at which attention outputs are compared: the same on every process."""
        if not planned.stage.attention:
            return None
        tokens = 1
        for length, size in zip(planned.pool.shape[1:], self.patch, strict=True):
            tokens *= length // size
        count = min(tokens, planned.stage.queries)
        rows = generator(self.seed, QUERIES, planned.serial).choice(tokens, count, replace=False)
        rows.sort()
        return self._put(rows.tolist())

    def _put(self, values: list) -> torch.Tensor:
        return put(torch.tensor(values), self.device)
