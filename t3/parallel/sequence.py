"""One video's tokens over several ranks: each has a run of them everywhere but in attention, where it has all tokens of
some heads (Ulysses, arXiv 2309.14509). T3's windows are taken between the two all-to-alls.

Projections, the norms over the full width and the rotation need a rank's own tokens only, so they are done before; what
is received needs no more than grouping. diffusers' own Ulysses attention does the two all-to-alls around attention that
returns all heads at once, waits for each, and asks all ranks for their number of tokens every time; here they go by
groups of heads, so that one group is on its way while another is attended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..block import Projections, Windows, attend_heads, head_groups, project
from ..errors import T3Error

# Groups of heads where memory does not ask for more: what is sent before the first is attended and after the last was
# is not hidden by work, and less in more groups; but small groups keep a card less busy.
GROUPS = 3


@dataclass(frozen=True)
class Spread:
    """The ranks that share a video's tokens, and this one's place among them.

    overlap: send while attending. groups: of heads, at least. packed: write projections as they are sent, if possible.
    The result depends on none of them, but for rounding.
    """

    group: Any
    rank: int
    size: int
    overlap: bool = True
    groups: int = GROUPS
    packed: bool = True

    def shares(self, tokens: int) -> list[int]:
        """Tokens of each rank, as `torch.tensor_split` gives them: those of the first may have one more."""
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def at_once(self, heads: int, most: int | None) -> int:
        """Heads in a group, of the `heads` that this rank attends; `most`: what memory allows."""
        wanted = -(-heads // self.groups)
        return wanted if most is None else max(1, min(wanted, most))


def attend_projections(
    p: Projections, windows: Windows, spread: Spread, most: int | None, chunks: Sequence[slice]
) -> torch.Tensor:
    """As `block.attend`, of one rank's tokens: p and chunks are of these. Returns `[B, n, width]`, of its own."""
    batch, tokens, width = p.shape
    own = p.heads // spread.size
    groups = head_groups(own, spread.at_once(own, most))
    if p.heads % spread.size or own % len(groups) or not spread.packed:
        qkv = [p.empty(width) for _ in range(3)]
        project(p, qkv, None, None, chunks)
        return attend_over_ranks(qkv, windows, p.heads, spread, most)
    # Written at once as they are sent: a run of memory for each group and rank.
    size = (batch, len(groups), spread.size, tokens, width // spread.size // len(groups))
    packed = [p.like.new_empty(size) for _ in range(3)]
    project(p, [x.permute(0, 3, 2, 1, 4) for x in packed], None, None, chunks)
    shares = _checked(spread, p.heads, tokens, windows)

    def send(number: int) -> list[Arriving]:
        return [_send_heads([some[number].flatten(0, 1) for some in x], spread, shares) for x in packed]

    return _attend(send, p.empty(width), groups, windows, spread, shares)


def attend_over_ranks(
    qkv: Sequence[torch.Tensor], windows: Windows, heads: int, spread: Spread, most: int | None = None
) -> torch.Tensor:
    """T3 self-attention of all ranks' tokens, before its output projection, for this rank's.

    qkv: `[B, n, width]` each, normed and turned, contiguous: the tokens of this rank; q is written over and returned.
    windows: of the whole video. most: heads to attend at once at most, of the `heads / size` of this rank.
    No gradients. Raises `T3Error` where heads cannot be shared alike.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
        raise T3Error("attention over several ranks has no gradients: use torch.no_grad() or inference_mode().")
    shares = _checked(spread, heads, qkv[0].shape[1], windows)
    own = heads // spread.size
    groups = head_groups(own, spread.at_once(own, most))
    by_rank = [x.unflatten(2, (spread.size, own, -1)) for x in qkv]

    def send(number: int) -> list[Arriving]:
        return [_to_heads(x[:, :, :, groups[number]].flatten(3), spread, shares) for x in by_rank]

    # In the place of the queries: those of a group have been sent when its results come back.
    return _attend(send, qkv[0], groups, windows, spread, shares)


def _checked(spread: Spread, heads: int, tokens: int, windows: Windows) -> list[int]:
    """Tokens of each rank. Raises `T3Error` where heads or tokens are not what ranks can share."""
    if heads % spread.size:
        raise T3Error(f"{heads} heads cannot be shared alike by {spread.size} ranks.")
    shares = spread.shares(windows.grid.tokens)
    if tokens != shares[spread.rank]:
        raise T3Error(
            f"rank {spread.rank} of {spread.size} has {tokens} tokens of a grid of {windows.grid.tokens}; "
            f"expected {shares[spread.rank]}."
        )
    return shares


def _attend(
    send: Callable[[int], list[Arriving]],
    out: torch.Tensor,
    groups: list[slice],
    windows: Windows,
    spread: Spread,
    shares: list[int],
) -> torch.Tensor:
    """Attend group after group of heads: `send(number)` begins to exchange one's q, k, v. Fills `out` `[B, n, width]`.

    While one is attended the next comes in and the last goes back.
    """
    slots = out.unflatten(2, (spread.size, groups[-1].stop, -1))
    back: list[tuple[Arriving, slice]] = []

    def take_back() -> None:
        arriving, some = back.pop(0)
        slots[:, :, :, some] = arriving.wait().unflatten(3, (some.stop - some.start, -1))

    coming = send(0)
    for number, some in enumerate(groups):
        more = number + 1 < len(groups)
        following = send(number + 1) if more and spread.overlap else []
        received = [arriving.wait() for arriving in coming]
        attend_heads(received, windows, some.stop - some.start, received[0])
        back.append((_to_tokens(received[0], spread, shares), some))
        del received
        while len(back) > (1 if spread.overlap else 0):
            take_back()
        coming = send(number + 1) if more and not spread.overlap else following
    while back:
        take_back()
    return out


class Arriving:
    """What other ranks are sending: `wait()` gives it, in the order of what is computed next."""

    def __init__(self, works: list[Any], kept: list[torch.Tensor], result: torch.Tensor) -> None:
        self._works, self._kept, self._result = works, kept, result

    def wait(self) -> torch.Tensor:
        """The tensor, once it is there: a card waits, its process does not."""
        for work in self._works:
            work.wait()
        self._kept.clear()
        return self._result


def _to_heads(x: torch.Tensor, spread: Spread, shares: list[int]) -> Arriving:
    """`[B, n, size, w]`, own tokens of each rank's heads, to `[B, N, w]`, all tokens of this rank's heads."""
    return _send_heads([some.transpose(0, 1).flatten(0, 1).contiguous() for some in x], spread, shares)


def _send_heads(packed: list[torch.Tensor], spread: Spread, shares: list[int]) -> Arriving:
    """The same of each sample's `[size * n, w]`, what goes to each rank one after the other."""
    result = packed[0].new_empty((len(packed), sum(shares), packed[0].shape[1]))
    sizes = [shares[spread.rank]] * spread.size
    works = [_all_to_all(to, some, shares, sizes, spread) for to, some in zip(result, packed, strict=True)]
    return Arriving(works, packed, result)


def _to_tokens(x: torch.Tensor, spread: Spread, shares: list[int]) -> Arriving:
    """`[B, N, w]` back to `[B, n, size, w]`."""
    batch, _, width = x.shape
    own = shares[spread.rank]
    result = x.new_empty((batch, spread.size * own, width))
    works = [_all_to_all(to, some, [own] * spread.size, shares, spread) for to, some in zip(result, x, strict=True)]
    return Arriving(works, [x], result.unflatten(1, (spread.size, own)).transpose(1, 2))


def _all_to_all(to: torch.Tensor, x: torch.Tensor, receive: list[int], send: list[int], spread: Spread) -> Any:
    work: Any = dist.all_to_all_single(to, x, receive, send, group=spread.group, async_op=True)
    if not spread.overlap:
        work.wait()
    return work


class Spreading:
    """A transformer whose tokens are spread over the ranks of `spread`, by diffusers' own hooks where they serve.

    To be made after T3 is installed, whose attention takes over in between. mesh: with diffusers' dimensions `ring`, of
    size 1, and `ulysses`. Every rank must be given the same inputs, and gets the whole output.
    """

    def __init__(self, transformer: Any, spread: Spread, mesh: Any) -> None:
        # Not `enable_parallelism`: it needs an accelerator, and its attention waits for each all-to-all.
        from diffusers import ContextParallelConfig
        from diffusers.hooks.context_parallel import apply_context_parallel

        self.transformer, self.spread = transformer, spread
        # "anything": tokens that the ranks do not divide are split by `tensor_split`.
        config = ContextParallelConfig(ulysses_degree=spread.size, ulysses_anything=True, mesh=mesh)
        config.setup(dist.get_rank(), dist.get_world_size(), mesh.device_type, mesh)
        self._plan = _plan(transformer)
        # Its gather asks for sizes at each call, and gloo cannot gather different ones.
        del self._plan["proj_out"]
        apply_context_parallel(transformer, config, self._plan)
        self._tokens = 0
        self._hooks = [
            transformer.patch_embedding.register_forward_hook(self._count),
            transformer.proj_out.register_forward_hook(self._gather),
        ]

    def remove(self) -> None:
        """Each rank has all tokens again. T3's processors must be told apart, or removed."""
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(self.transformer, self._plan)
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._tokens = output.shape[2:].numel()

    def _gather(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return gather(output, self.spread, self._tokens)


def _plan(transformer: Any) -> dict[str, Any]:
    from diffusers.models._modeling_parallel import ContextParallelInput
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    plan = dict(transformer._cp_plan or WanTransformer3DModel._cp_plan)
    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    # diffusers has no plan for VACE: each of its blocks is given the video, the first the control as well.
    for number in range(len(getattr(transformer, "vace_blocks", ()))):
        plan[f"vace_blocks.{number}"] = {"hidden_states": tokens}
        if number == 0:
            plan["vace_blocks.0"]["control_hidden_states"] = tokens
    return plan


def gather(x: torch.Tensor, spread: Spread, tokens: int) -> torch.Tensor:
    """`[B, n, C]` of each rank to `[B, tokens, C]` on every rank."""
    shares = spread.shares(tokens)
    most, own = max(shares), shares[spread.rank]
    padded = x.contiguous() if own == most else torch.cat([x, x.new_zeros(x.shape[0], most - own, x.shape[2])], 1)
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=spread.group)
    return torch.cat([part[:, :share] for part, share in zip(parts, shares, strict=True)], dim=1)
