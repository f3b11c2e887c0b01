"""How ranks share the work: which splits are legal, and which is the fastest. Pure Python, no torch.

world = data x guidance x sequence. `data` groups of ranks, teams, make a clip each. In a team `guidance` tells the
prediction with the prompt from that without, and `sequence` ranks share the tokens of one prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import T3Error

AUTO = "auto"
NAMES = ("data", "guidance", "sequence")
# How much faster two ranks are than one, measured with the 1.3B at 4K: predictions, which meet once a step, on two H100
# (benchmarks/older/parallel_4k_2_h100.json; two H200 gave 2.01, which is noise), tokens, which meet four times a layer,
# on two H200 (benchmarks/parallel_4k_2_h200.json). Prompts share nothing.
GUIDANCE_OF_TWO = 1.985
SEQUENCE_OF_TWO = 1.853


@dataclass(frozen=True)
class Task:
    """What a split depends on. heads, tokens: of the model and the clip; guided: whether there are two predictions a
    step; clips: to make, or None if that is not known."""

    heads: int
    tokens: int
    guided: bool = True
    clips: int | None = 1


@dataclass(frozen=True)
class Split:
    """Ranks of each kind; their product is the size of the world. Ranks of one sequence stand side by side."""

    data: int = 1
    guidance: int = 1
    sequence: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.data * self.guidance * self.sequence

    @property
    def team(self) -> int:
        """Ranks that make one clip together."""
        return self.guidance * self.sequence

    def place(self, rank: int) -> tuple[int, int, int]:
        """Which team, which prediction and which part of the tokens are this rank's."""
        return rank // self.team, rank // self.sequence % self.guidance, rank % self.sequence

    def shares(self, tokens: int) -> list[int]:
        """Tokens of each rank of a sequence: those of the first ones may have one more."""
        return [tokens // self.sequence + (rank < tokens % self.sequence) for rank in range(self.sequence)]

    def cost(self, task: Task) -> float:
        """Time to make all clips, in times of one prediction on one rank."""
        rounds = 1 if task.clips is None else math.ceil(task.clips / self.data)
        predictions = (2 if self.guidance == 1 else 2 / GUIDANCE_OF_TWO) if task.guided else 1
        return rounds * predictions * max(self.shares(task.tokens)) / task.tokens * _slower(self.sequence)

    def __str__(self) -> str:
        sizes = zip(NAMES, (self.data, self.guidance, self.sequence), strict=True)
        parts = [f"{name} {n}" for name, n in sizes if n > 1]
        return " x ".join(parts) or "single process"


def _slower(sequence: int) -> float:
    """How many times longer a rank takes for its share of the tokens than without exchange. Of each token it sends
    (ranks - 1) / ranks."""
    return 1 + (2 / SEQUENCE_OF_TWO - 1) * 2 * (1 - 1 / sequence)


def choose(text: str, size: int, task: Task) -> tuple[Split, str]:
    """The split of `size` ranks that `--split` asks for, and why in words. Raises `T3Error` for one that is not legal.

    text: `auto`, or `data=2,guidance=2,sequence=2` where what is left out is 1.
    """
    if text == AUTO:
        return _fastest(size, task)
    split = _parse(text)
    if split.size != size:
        product = " x ".join(str(n) for n in (split.data, split.guidance, split.sequence) if n > 1) or "1"
        raise T3Error(
            f"--split {text} is for {split.size} processes ({product}), and {size} "
            f"{'was' if size == 1 else 'were'} started: start {split.size} (torchrun --nproc-per-node), or use "
            f"--split {AUTO}."
        )
    why = refusal(split, task)
    if why:
        raise T3Error(f"--split {text}: {why}")
    return split, "as chosen"


def refusal(split: Split, task: Task) -> str | None:
    """Why a split cannot be or leaves a rank without work, with the nearest that can, or None."""
    if split.guidance > 2:
        return f"guidance is {split.guidance}, and a step has two predictions: use guidance=2."
    if split.guidance == 2 and not task.guided:
        return "without guidance (--cfg 1) a step has one prediction, and a rank would idle: use guidance=1."
    if task.heads % split.sequence or split.sequence > task.tokens:
        legal = [n for n in range(1, task.heads + 1) if task.heads % n == 0 and n <= task.tokens]
        near = min(legal, key=lambda n: (abs(n - split.sequence), -n))
        return (
            f"{task.heads} heads cannot be shared alike by sequence={split.sequence}, so that ranks would idle. "
            f"Nearest: sequence={near}; legal are {', '.join(map(str, legal))}."
        )
    if task.clips is not None and split.data > max(1, task.clips):
        return (
            f"data={split.data} with {task.clips} clip{'' if task.clips == 1 else 's'} to make leaves ranks without "
            f"one: use data={max(1, task.clips)} and share each clip by guidance or sequence."
        )
    return None


def legal_splits(size: int, task: Task) -> list[Split]:
    """All splits of so many ranks in which each has work."""
    found = []
    for sequence in _divisors(size):
        for guidance in _divisors(size // sequence):
            split = Split(size // sequence // guidance, guidance, sequence)
            if refusal(split, task) is None:
                found.append(split)
    return found


def _fastest(size: int, task: Task) -> tuple[Split, str]:
    splits = legal_splits(size, task)
    if not splits:
        sizes = [n for n in range(1, 2 * size + 1) if legal_splits(n, task)]
        below, above = max(n for n in sizes if n < size), min((n for n in sizes if n > size), default=None)
        near = f"{below}" if above is None else f"{below} or {above}"
        raise T3Error(
            f"{size} processes cannot share {'the clips' if task.clips is None else _clips(task.clips)} of a model "
            f"with {task.heads} heads {'with' if task.guided else 'without'} guidance so that none idles. Nearest: "
            f"start {near}."
        )
    if size == 1:
        return splits[0], "one process"
    # Of equals the one that moves less.
    best = min(splits, key=lambda split: (round(split.cost(task), 9), split.sequence, split.guidance))
    if len(splits) == 1:
        return best, "the only one in which every rank has work"
    gain = Split().cost(task) / best.cost(task)
    return best, f"fastest of {len(splits)} by estimate, {gain:.2f} times one process"


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _parse(text: str) -> Split:
    values: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name == "ring":
            raise T3Error(
                f"--split {text}: a ring hands keys from rank to rank in the order of tokens and needs each rank to "
                "attend all of them in turn. T3's windows take tokens from all over the video, and a rank's own "
                "tokens fill none. Use sequence=N, which hands each rank all tokens of some heads."
            )
        if name not in NAMES or not equals or not number.isdecimal() or int(number) < 1 or name in values:
            raise T3Error(
                f"--split {text}: {part!r} is not understood. Use {AUTO}, or e.g. data=2,guidance=2,sequence=2: each "
                "at most once, 1 or more."
            )
        values[name] = int(number)
    return Split(**values)


def facts(split: Split, reason: str, tokens: int) -> dict:
    """The split as plain data, for `--json`."""
    return {
        "mode": str(split),
        "ranks": split.size,
        "data": split.data,
        "guidance": split.guidance,
        "sequence": split.sequence,
        "reason": reason,
        "tokens_per_rank": split.shares(tokens) * (split.data * split.guidance),
    }


def line(found: dict) -> str:
    """`facts` for people."""
    shares = sorted(set(found["tokens_per_rank"]), reverse=True)
    tokens = " or ".join(f"{n:,}" for n in shares)
    return f"split      {found['mode']} over {found['ranks']} ranks ({found['reason']}); {tokens} tokens a rank"
