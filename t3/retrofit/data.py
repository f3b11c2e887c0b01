"""Encoded clips for training: checked against the model, sorted into pools of one shape, kept where they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import T3Error
from .conditioning import Conditioning
from .draws import ORDER, POOL, generator
from .shards import Encoded, Shards, Stored, open_shards
from .text import rows_for

if TYPE_CHECKING:
    from .config import Data


_RESIDENT = 0.25  # of the free memory, at most, for clips that wait on the device


@dataclass(frozen=True)
class Reference:
    """A clip of an open data set."""

    shards: Shards
    number: int

    @property
    def stored(self) -> Stored:
        return self.shards.clips[self.number]

    def load(self) -> Encoded:
        return self.shards.load(self.number)

    def read(self, tokens: int, given: Sequence[str]) -> dict[str, torch.Tensor]:
        """The clip's tensors in bfloat16 on the CPU: latents, text padded to `tokens`, and those named in `given`."""
        clip = self.load()
        tensors = {"latents": clip.latents, "text": clip.text, **{name: clip.given[name] for name in given}}
        half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        return {**half, "text": pad_text(half["text"], tokens)}

    def grey(self, device: torch.device) -> torch.Tensor | None:
        """Latents `[C, T, H, W]` of a grey clip of this one's size on `device`, where the data set has them."""
        found = self.shards.grey(self.stored.latents)
        return None if found is None else found.to(device, torch.bfloat16)


@dataclass
class Pool:
    """Clips of one set whose latents have one shape. `texts` are padded to `tokens` rows of zeros when taken.

    given: names of the tensors that are read beside latents and text. batch: clips a step on each process, 0 for as
    many as usual. After `settle` the clips lie on a device, a tensor for each name, and taking a batch reads no disk.
    """

    name: str
    shape: tuple[int, ...]
    clips: list[Reference]
    tokens: int
    given: tuple[str, ...] = ()
    batch: int = 0
    _held: dict[str, torch.Tensor] = field(default_factory=dict)
    _grey: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool in memory, in 16 bits a number."""
        if not self.clips:
            return 0
        stored = self.clips[0].stored
        given = sum(_count(stored.given[name]) for name in self.given)
        return 2 * len(self.clips) * (_count(self.shape) + self.tokens * stored.text[1] + given)

    def each(self, usual: int) -> int:
        """How many clips of this pool each process takes at once; usual: where its set does not say."""
        return self.batch or usual

    def settle(self, device: torch.device) -> None:
        """Read all clips and keep them on `device`; nothing is read twice."""
        if self._held and self._held["latents"].device.type == device.type:
            return
        self._held = {name: tensor.to(device) for name, tensor in self._stacked(range(len(self.clips))).items()}

    def take(self, numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Latents `[B, C, T, H, W]`, text `[B, tokens, text_dim]` and what else these clips give, on `device`."""
        if self._held:
            index = torch.tensor(numbers)
            if device.type == "cuda":
                index = index.pin_memory()
            index = index.to(self._held["latents"].device, non_blocking=True)
            return {name: tensor.index_select(0, index) for name, tensor in self._held.items()}
        stacked = self._stacked(numbers)
        if device.type == "cuda":
            stacked = {name: tensor.pin_memory() for name, tensor in stacked.items()}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in stacked.items()}

    def grey(self, device: torch.device) -> torch.Tensor | None:
        """Latents `[C, T, H, W]` of a grey clip of this size on `device`, where the data set has them."""
        if self._grey is None or self._grey.device.type != device.type:
            self._grey = self.clips[0].grey(device)
        return self._grey

    def _stacked(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        loaded = [self.clips[number].read(self.tokens, self.given) for number in numbers]
        return {name: torch.stack([clip[name] for clip in loaded]) for name in loaded[0]}


def pad_text(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """A text embedding `[n, dim]` with rows of zeros to `[tokens, dim]`, as Wan's pipelines pad it."""
    return torch.cat([text, text.new_zeros(tokens - text.shape[0], text.shape[1])])


@dataclass
class Clips:
    """All that a run learns from: `pools` to train on, `held_out` to measure on, the empty caption's embedding, how
    the model is told of images, to how many rows texts are padded (see `text.py`), and by folder a mark that changes
    with what the data set holds."""

    pools: list[Pool]
    held_out: list[Reference]
    empty: torch.Tensor | None
    notes: list[str] = field(default_factory=list)
    conditioning: Conditioning = field(default_factory=Conditioning)
    rows: int = 512
    marks: dict[str, str] = field(default_factory=dict)

    def held(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a held-out clip, as `Reference.read` gives them."""
        return self.held_out[number].read(self.rows, self.conditioning.tensors)

    @property
    def count(self) -> int:
        return sum(len(pool.clips) for pool in self.pools)

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)


def drawn(pools: Iterable[Pool], mix: Mapping[str, float]) -> list[Pool]:
    """The pools that a stage with this `mix` (share of the batches by set; empty is all) takes clips from."""
    return [pool for pool in pools if not mix or mix.get(pool.name, 0.0) > 0]


def stay_on(asked: str, nbytes: int, device: torch.device) -> bool:
    """Whether clips of so many bytes wait on the training device; asked: `[data] resident`."""
    if asked != "auto":
        return asked == "device"
    if device.type == "cuda":
        return nbytes < _RESIDENT * torch.cuda.mem_get_info(device)[0]
    return nbytes < 2**30


def open_clips(data: Data, transformer: Mapping[str, Any], tokens: int) -> Clips:
    """Open every data set and check it against the model's config. No clip is read.

    Raises `T3Error` for a set that is missing or empty, made for another model, without what this kind of model is
    given, or texts longer than `tokens`.
    """
    conditioning = Conditioning.of(transformer, data.conditions)
    pools: dict[tuple[str, tuple[int, ...]], Pool] = {}
    held_out: list[Reference] = []
    empty, notes, marks = None, [], {}
    for entry in data.sets:
        references = _references(entry.folder, transformer, tokens, conditioning)
        marks[entry.folder] = references[0].shards.fingerprint()
        if not data.validation and data.holdout:
            if data.holdout >= len(references):
                raise T3Error(
                    f"[data] holdout is {data.holdout}, and {entry.folder} has {len(references)} clips. "
                    f"Nearest: {len(references) - 1}."
                )
            references, kept = references[: -data.holdout], references[-data.holdout :]
            held_out += kept
        for reference in references:
            shape = reference.stored.latents
            pool = Pool(entry.name, shape, [], tokens, conditioning.tensors, entry.batch)
            pools.setdefault((entry.name, shape), pool).clips.append(reference)
        found = references[0].shards.empty_text()
        empty = found if empty is None else empty
        skipped = len(references[0].shards.index["skipped"])
        if skipped:
            notes.append(f"{entry.folder}: {skipped} sources were skipped when it was encoded (see its index.json).")
    for folder in data.validation:
        references = _references(folder, transformer, tokens, conditioning)
        marks[folder] = references[0].shards.fingerprint()
        held_out += references
    if data.caption_dropout and empty is None:
        raise T3Error(
            f"[data] caption_dropout is {data.caption_dropout}, but no data set holds the empty caption's embedding. "
            "Set it to 0, or encode the data again with this release."
        )
    rows = tokens
    if not conditioning.images:
        lengths = [clip.stored.text[0] for clips in (held_out, *(p.clips for p in pools.values())) for clip in clips]
        rows = rows_for(max([*lengths, 0 if empty is None else len(empty)]), tokens)
    for pool in pools.values():
        pool.tokens = rows
    padded = None if empty is None else pad_text(empty.to(torch.bfloat16), rows)
    return Clips(list(pools.values()), held_out, padded, notes, conditioning, rows, marks)


def _references(
    folder: str, transformer: Mapping[str, Any], tokens: int, conditioning: Conditioning
) -> list[Reference]:
    shards = open_shards(folder)
    if not shards.clips:
        raise T3Error(f"{folder} holds no clip. Its index.json says what was skipped, and why.")
    channels, text_dim, patch = transformer["out_channels"], transformer["text_dim"], transformer["patch_size"]
    for clip in shards.clips:
        where = f"{folder}: the clip {clip.facts.source}"
        if clip.latents[0] != channels:
            raise T3Error(
                f"{where} has latents of {clip.latents[0]} channels and this model makes {channels}. "
                "Encode the data with this model's VAE."
            )
        if clip.text[1] != text_dim:
            raise T3Error(
                f"{where} has text embeddings {clip.text[1]} wide and this model takes {text_dim}. "
                "Encode the data with this model's text encoder."
            )
        if clip.text[0] > tokens:
            raise T3Error(
                f"{where} has a caption of {clip.text[0]} tokens, more than [model] text_tokens = {tokens}. "
                f"Set it to {clip.text[0]} or more."
            )
        if any(length % size for length, size in zip(clip.latents[1:], patch, strict=True)):
            raise T3Error(f"{where} has latents of {clip.latents[1:]}, which patches of {tuple(patch)} do not divide.")
        conditioning.check(clip, where, tokens)
    if conditioning.takes_grey:
        for shape in sorted({clip.latents for clip in shards.clips}):
            if shards.grey(shape) is None:
                raise T3Error(
                    f"{folder} lacks latents {list(shape)} of a grey clip, which a VACE model is given for what it is "
                    "to make. Run the encode of this folder once more with the VACE model as --model: it adds them."
                )
    return [Reference(shards, number) for number in range(len(shards.clips))]


@dataclass(frozen=True)
class Layout:
    """How the clips of a round are shared out: `batch` on each of `processes`, of which this is number `rank`, where
    their set does not say otherwise."""

    batch: int
    processes: int
    rank: int


class Order:
    """Which clips come next, the same on every process. The state is how many each pool has given.

    Each pool gives its clips in an order of its own, every clip once before any a second time.
    """

    def __init__(self, pools: Sequence[Pool], seed: int, layout: Layout) -> None:
        self.pools = list(pools)
        self.seed = seed
        self.layout = layout
        self.batches = 0
        self.given = [0] * len(self.pools)
        self._orders: dict[int, tuple[int, Any]] = {}

    def next(self, mix: Mapping[str, float]) -> tuple[Pool, list[int]]:
        """The next clips for all processes, of one pool: numbers in it. `mix`: share of the batches by set, if any."""
        weights = np.cumsum([self.weight(pool, mix) for pool in self.pools])
        at = generator(self.seed, POOL, self.batches).random() * weights[-1]
        chosen = int(np.searchsorted(weights, at, side="right"))
        self.batches += 1
        first, count = self.given[chosen], self.pools[chosen].each(self.layout.batch) * self.layout.processes
        self.given[chosen] += count
        return self.pools[chosen], [self._number(chosen, at) for at in range(first, first + count)]

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches, "given": list(self.given)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.batches, self.given = state["batches"], list(state["given"])

    def weight(self, pool: Pool, mix: Mapping[str, float]) -> float:
        """A pool's share of the batches, up to a factor that all have in common."""
        if not mix:
            return len(pool.clips) / pool.each(self.layout.batch)
        all_of_set = sum(len(other.clips) for other in self.pools if other.name == pool.name)
        return mix.get(pool.name, 0.0) * len(pool.clips) / all_of_set

    def _number(self, pool: int, at: int) -> int:
        count = len(self.pools[pool].clips)
        epoch, place = divmod(at, count)
        known = self._orders.get(pool)
        if known is None or known[0] != epoch:
            known = epoch, generator(self.seed, ORDER, pool, epoch).permutation(count)
            self._orders[pool] = known
        return int(known[1][place])


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
