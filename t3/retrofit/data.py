"""Encoded clips for training: checked against the model, sorted into pools of one shape, kept where they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import T3Error
from .draws import ORDER, POOL, generator
from .shards import Encoded, Shards, Stored, open_shards

if TYPE_CHECKING:
    from .config import Data


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


@dataclass
class Pool:
    """Clips of one set whose latents have one shape. `texts` are padded to `tokens` rows of zeros when taken.

    After `settle` the clips lie on a device as two tensors, and taking a batch reads no disk.
    """

    name: str
    shape: tuple[int, ...]
    clips: list[Reference]
    tokens: int
    _latents: torch.Tensor | None = None
    _texts: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool in memory, in 16 bits a number."""
        text = self.tokens * (self.clips[0].stored.text[1] if self.clips else 0)
        return 2 * len(self.clips) * (_count(self.shape) + text)

    def settle(self, device: torch.device) -> None:
        """Read all clips and keep them on `device`; nothing is read twice."""
        if self._latents is not None and self._latents.device.type == device.type:
            return
        loaded = [self._read(reference) for reference in self.clips]
        self._latents = torch.stack([latents for latents, _ in loaded]).to(device)
        self._texts = torch.stack([text for _, text in loaded]).to(device)

    def take(self, numbers: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[B, C, T, H, W]` and texts `[B, tokens, text_dim]` of these clips, on `device`."""
        if self._latents is not None and self._texts is not None:
            index = torch.tensor(numbers)
            if device.type == "cuda":
                index = index.pin_memory()
            index = index.to(self._latents.device, non_blocking=True)
            return self._latents.index_select(0, index), self._texts.index_select(0, index)
        loaded = [self._read(self.clips[number]) for number in numbers]
        stacked = [torch.stack(parts) for parts in zip(*loaded, strict=True)]
        if device.type == "cuda":
            stacked = [tensor.pin_memory() for tensor in stacked]
        return stacked[0].to(device, non_blocking=True), stacked[1].to(device, non_blocking=True)

    def _read(self, reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
        clip = reference.load()
        return clip.latents.to(torch.bfloat16), pad_text(clip.text.to(torch.bfloat16), self.tokens)


def pad_text(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """A text embedding `[n, dim]` with rows of zeros to `[tokens, dim]`, as Wan's pipelines pad it."""
    return torch.cat([text, text.new_zeros(tokens - text.shape[0], text.shape[1])])


@dataclass
class Clips:
    """All that a run learns from: `pools` to train on, `held_out` to measure on, and the empty caption's embedding."""

    pools: list[Pool]
    held_out: list[Reference]
    empty: torch.Tensor | None
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(pool.clips) for pool in self.pools)

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)


def open_clips(data: Data, transformer: Mapping[str, Any], tokens: int) -> Clips:
    """Open every data set and check it against the model's config. No clip is read.

    Raises `T3Error` for a set that is missing or empty, made for another model, or texts longer than `tokens`.
    """
    pools: dict[tuple[str, tuple[int, ...]], Pool] = {}
    held_out: list[Reference] = []
    empty, notes = None, []
    for entry in data.sets:
        references = _references(entry.folder, transformer, tokens)
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
            pools.setdefault((entry.name, shape), Pool(entry.name, shape, [], tokens)).clips.append(reference)
        found = references[0].shards.empty_text()
        empty = found if empty is None else empty
        skipped = len(references[0].shards.index["skipped"])
        if skipped:
            notes.append(f"{entry.folder}: {skipped} sources were skipped when it was encoded (see its index.json).")
    for folder in data.validation:
        held_out += _references(folder, transformer, tokens)
    if data.caption_dropout and empty is None:
        raise T3Error(
            f"[data] caption_dropout is {data.caption_dropout}, but no data set holds the empty caption's embedding. "
            "Set it to 0, or encode the data again with this release."
        )
    padded = None if empty is None else pad_text(empty.to(torch.bfloat16), tokens)
    return Clips(list(pools.values()), held_out, padded, notes)


def _references(folder: str, transformer: Mapping[str, Any], tokens: int) -> list[Reference]:
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
    return [Reference(shards, number) for number in range(len(shards.clips))]


class Order:
    """Which clips come next, the same on every process. The state is how many each pool has given.

    Each pool gives its clips in an order of its own, every clip once before any a second time.
    """

    def __init__(self, pools: Sequence[Pool], seed: int) -> None:
        self.pools = list(pools)
        self.seed = seed
        self.batches = 0
        self.given = [0] * len(self.pools)
        self._orders: dict[int, tuple[int, Any]] = {}

    def next(self, count: int, mix: Mapping[str, float]) -> tuple[Pool, list[int]]:
        """The next `count` clips, all of one pool: numbers in it. `mix`: share of the batches by set, or empty."""
        weights = np.cumsum([self.weight(pool, mix) for pool in self.pools])
        at = generator(self.seed, POOL, self.batches).random() * weights[-1]
        chosen = int(np.searchsorted(weights, at, side="right"))
        self.batches += 1
        first = self.given[chosen]
        self.given[chosen] += count
        return self.pools[chosen], [self._number(chosen, at) for at in range(first, first + count)]

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches, "given": list(self.given)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.batches, self.given = state["batches"], list(state["given"])

    def weight(self, pool: Pool, mix: Mapping[str, float]) -> float:
        """A pool's share of the batches, up to a factor that all have in common."""
        if not mix:
            return len(pool.clips)
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
