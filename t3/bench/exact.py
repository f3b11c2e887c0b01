"""The truth in float64 for a few tokens, straight from the definition; and how far a result is from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan import Partition
from ..windows import groupings, window_indices
from .cases import EPS, LayerInputs


def attend_exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention in float64, head by head. q: `[queries, heads, head_dim]`; k, v: `[keys, heads, head_dim]`."""
    outs = []
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head].double().T * q.shape[-1] ** -0.5
        outs.append(scores.softmax(-1) @ v[:, head].double())
    return torch.stack(outs, 1)


def exact_tokens(inputs: LayerInputs, partition: Partition, tokens: list[int]) -> torch.Tensor:
    """T3 from the projections at a few tokens, `[tokens, width]` float64: norm, rotation, windows, mean."""
    case, device = inputs.case, inputs.device
    q, k, v = (x[0] for x in inputs.qkv)
    turn = torch.complex(*(table[0].double() for table in inputs.turns))[:, None]

    def prepare(x: torch.Tensor, weight: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x = x[at].double()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
        pairs = torch.view_as_complex(x.unflatten(-1, (case.heads, -1, 2)).contiguous()) * turn[at]
        return torch.view_as_real(pairs).flatten(-2)

    kinds = groupings(case.grid, partition)
    mean = torch.zeros(len(tokens), case.width, dtype=torch.float64, device=device)
    for kind in kinds:
        classes = window_indices(tuple(case.grid), tuple(partition), kind, device)
        for row, token in enumerate(tokens):
            window = next(index[(index == token).any(1)][0] for index in classes if (index == token).any())
            query = prepare(q, inputs.norms[0], torch.tensor([token], device=device))
            keys = prepare(k, inputs.norms[1], window)
            out = attend_exactly(query, keys, v[window].unflatten(-1, (case.heads, -1)))
            mean[row] += out.flatten() / len(kinds)
    return mean


def exact_windows(qkv: Sequence[torch.Tensor], classes: Sequence[torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """One grouping's attention at a few tokens, `[tokens, heads, head_dim]` float64.

    qkv: `[N, heads, head_dim]` each, as they are attended; classes: what `window_indices` gives.
    """
    q, k, v = qkv
    outs = []
    for token in tokens:
        window = next(index[(index == token).any(1)][0] for index in classes if (index == token).any())
        outs.append(attend_exactly(q[token : token + 1], k[window], v[window])[0])
    return torch.stack(outs)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the difference over the RMS of the truth."""
    found = found.double().reshape(exact.shape)
    return ((found - exact).norm() / exact.norm()).item()
