"""The ranks that make one clip together, and the groups in which they talk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .split import NAMES, Split
from .world import World

if TYPE_CHECKING:
    from ..vae.ranks import Ranks
    from .sequence import Spread


@dataclass
class Team:
    """Ranks `data` groups apart make different clips; this is one's own group.

    index: which of `split.data` teams; rank, size: of this process in it; prediction: 0 with the prompt, 1 without;
    part: which of the tokens. The rank 0 of a team, its leader, alone writes its clips' files.
    group: the torch.distributed group of the team; guidance, sequence: those of its ranks that hold the other
    prediction, and the other tokens. None where that is this rank alone.
    """

    world: World
    split: Split
    index: int = 0
    prediction: int = 0
    part: int = 0
    group: Any = None
    guidance: Any = None
    sequence: Any = None
    _told: int = 0
    _ranks: Ranks | None = None

    @property
    def size(self) -> int:
        """Ranks of the team."""
        return self.split.team

    @property
    def rank(self) -> int:
        """This rank within its team."""
        return self.prediction * self.split.sequence + self.part

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes the team's files."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """The leader's `value` on every rank of the team; one that JSON can hold. All its ranks must call this."""
        if self.size == 1:
            return value
        self._told += 1
        key = f"team/{self.index}/{self._told}"
        if self.is_leader:
            self.world.tell(key, value)
            return value
        return self.world.hear(key)

    def ranks(self) -> Ranks | None:
        """The team as `t3.vae` takes it, None where it is this rank alone. All its ranks must call this together."""
        if self.group is not None and self._ranks is None:
            from ..vae.ranks import Ranks

            self._ranks = Ranks(self.group)
        return self._ranks

    def spread(self) -> Spread | None:
        """How this rank shares a video's tokens with others, if it does: for `install_t3`."""
        from .sequence import Spread

        return None if self.sequence is None else Spread(self.sequence, self.part, self.split.sequence)

    def divide(self, transformer: Any, spread: Spread | None) -> None:
        """Have `transformer`, on which T3 is installed with this `spread`, compute this rank's part alone."""
        if spread is not None:
            from .spreading import Spreading

            Spreading(transformer, spread)
        if self.guidance is not None:
            from .guidance import GuidanceSplit

            GuidanceSplit(transformer, self.guidance, self.prediction)


def form_team(world: World, split: Split) -> Team:
    """The team of this rank. All ranks of a world that was started must call this together."""
    index, prediction, part = split.place(world.rank)
    team = Team(world, split, index, prediction, part)
    if split.team == 1:
        return team
    from torch.distributed.device_mesh import init_device_mesh

    assert world.device is not None
    mesh = init_device_mesh(world.device.type, (split.data, split.guidance, split.sequence), mesh_dim_names=NAMES)
    team.group = mesh["guidance", "sequence"]._flatten("team").get_group()
    team.guidance = mesh["guidance"].get_group() if split.guidance > 1 else None
    team.sequence = mesh["sequence"].get_group() if split.sequence > 1 else None
    return team
