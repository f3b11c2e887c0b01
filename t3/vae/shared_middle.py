"""The middle stage over ranks: whole latent frames, to the same bits as on one.

A frame's attention, by far the most of it, sees that frame alone. The convolutions before and after it look a few
frames back: a rank goes through those before its own once more, to fill its feature cache. Of the attention's results
it needs those of a few frames of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attempt import Meter, Say, attempt, out_of_memory, wait_for
from .balance import frame_shares, warm_up
from .memory import DEPTH
from .past import Past
from .plan import Plan
from .ranks import Ranks
from .sums import layout


class SharedMiddle:
    """The middle stage of one clip of `frames` latent frames of `size` (H, W).

    coder: a WanDecoder or WanEncoder. plan: as in one process. work: "decode" or "encode".
    """

    def __init__(
        self,
        coder,
        frames: int,
        size: tuple[int, int],
        ranks: Ranks,
        plan: Plan,
        meter: Meter,
        say: Say,
        work: str,
    ) -> None:
        self.coder, self.frames, self.size, self.ranks = coder, frames, size, ranks
        self.plan, self.meter, self.say, self.work = plan, meter, say, work
        self.shares = frame_shares(frames, ranks.size)
        self.own = self.shares[ranks.rank]
        self.owner = [rank for rank, share in enumerate(self.shares) for _ in share]
        self._before, self._after = (
            [warm_up(share, lookback, DEPTH) for share in self.shares] for lookback in coder.lookback
        )

    @property
    def inputs(self) -> range:
        """The frames whose input this rank is asked for."""
        return range(self._before[self.ranks.rank].start, self.own.stop) if self.own else range(0)

    def run(self, give: Callable[[int], torch.Tensor]) -> list[torch.Tensor | None]:
        """The result for each of this rank's own frames, on `plan.keep_on`, and None for the others.

        give: the stage's input for a frame of `inputs`, on the coder's device.
        """
        attended: dict[int, torch.Tensor] = {}
        results: list[torch.Tensor | None] = [None] * self.frames

        def attend() -> None:
            attended.clear()
            past = Past(len(self.inputs))
            for frame in self.inputs:
                x = self.coder.before(give(frame), past)
                if frame in self.own:
                    attended[frame] = self.coder.attended(x, self.plan.scores).to(self.plan.keep_on)
                    wait_for(self.coder.device)

        self._attempt(attend)
        self._pass_on(attended)

        def finish() -> None:
            frames = range(self._after[self.ranks.rank].start, self.own.stop) if self.own else range(0)
            past = Past(len(frames))
            for frame in frames:
                result = self.coder.after(attended[frame].to(self.coder.device), past)
                if frame in self.own:
                    results[frame] = result.to(self.plan.keep_on)
                    wait_for(self.coder.device)
                    self.meter.add(self.size[0] * self.size[1])

        self._attempt(finish)
        return results

    def _attempt(self, step: Callable[[], None]) -> None:
        if attempt(step, self.coder.device, self.meter):
            return
        self.plan.keep_on, self.plan.scores = torch.device("cpu"), self.plan.scores // 4
        self.say(f"{self.work}: memory ran out in the middle stage; going on with its results in main memory.")
        if not attempt(step, self.coder.device, self.meter):
            raise out_of_memory(self.coder.device, "run the middle stage on one latent frame", self.work)

    def _pass_on(self, attended: dict[int, torch.Tensor]) -> None:
        """Frames that another rank warms up with, to it."""
        wanted = sorted({frame for warm in self._after for frame in warm})
        if wanted:
            self.ranks.meet()
        like = torch.empty(0, dtype=self.coder.dtype, device=self.coder.device)
        for frame in wanted:
            x = attended.get(frame)
            x = self.room(like, self.coder.structure.width) if x is None else x.to(like.device)
            self.ranks.share(x, self.owner[frame])
            if frame in self._after[self.ranks.rank]:
                attended[frame] = x.to(self.plan.keep_on)

    def room(self, like: torch.Tensor, channels: int) -> torch.Tensor:
        """A frame `[1, channels, H, W]` in the dtype of `like` on its device, as the layers lay it out."""
        order = layout(like.device)
        return torch.empty(1, channels, *self.size, dtype=like.dtype, device=like.device, memory_format=order)
