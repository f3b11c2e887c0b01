"""What each form of weights adds to a parameter, as plain sums: the truth that loaders must agree with.

The functions compute in the dtype of their arguments: give float64 for the truth, float32 for work. `parts` are one
change's tensors by role, as `adapter_file` names them; each form's roles and formula, at strength 1:

    diff    diff                                       scale * diff
    bias    diff                                       the same: the bias that belongs to a LoRA
    set     set                                        what brings the base to `set`
    lora    up, down [, mid]                           scale * up @ down, `mid` a core between them (Tucker)
    loha    w1_a, w1_b, w2_a, w2_b [, t1, t2]          scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise
    lokr    w1 or w1_a, w1_b; w2 or w2_a, w2_b [, t2]  scale * kron(w1, w2)

With `magnitude` (DoRA) the sum of base and change is then scaled to have these lengths, row by row or column by column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, "torch.Tensor"]
Shape = tuple[int, ...]

TENSOR_ROLE = {"diff": "diff", "bias": "diff", "set": "set"}  # forms of one tensor -> its role
# Roles of the forms made of several. Which of them may be absent is worked out in `missing_roles`.
ROLES = {
    "lora": ("up", "down", "mid"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
}


def changed(kind: str, parts: Parts, base: torch.Tensor, *, scale: float = 1.0, strength: float = 1.0) -> torch.Tensor:
    """`base` after a change at this strength. Only float rounding separates it from `base + strength * delta`."""
    if kind == "set" and strength == 1:
        return parts["set"].reshape(base.shape)
    return base + strength * delta(kind, parts, base, scale=scale)


def delta(kind: str, parts: Parts, base: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """What a change adds to `base` at strength 1, in the shape of `base`."""
    if kind == "set":
        return parts["set"].reshape(base.shape) - base
    out = scale * _product(kind, parts).reshape(base.shape)
    if "magnitude" in parts:
        return _with_lengths(base + out, parts["magnitude"]) - base
    return out


def _product(kind: str, parts: Parts) -> torch.Tensor:
    import torch

    if kind in ("diff", "bias"):
        return parts["diff"]
    if kind == "lora":
        up, down = parts["up"].flatten(1), parts["down"]
        if "mid" in parts:
            return torch.einsum("ri...,or,ic->oc...", parts["mid"], up, down.flatten(1))
        return up @ down.flatten(1)
    if kind == "loha":
        return _pair(parts, "w1", "t1") * _pair(parts, "w2", "t2")
    first = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    second = parts["w2"] if "w2" in parts else _pair(parts, "w2", "t2")
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _pair(parts: Parts, name: str, core: str) -> torch.Tensor:
    """`a @ b`, or with a core `[r, r, *kernel]` the sum over both ranks, where `a` is stored as `[r, out]`."""
    import torch

    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if core not in parts:
        return a @ b
    return torch.einsum("ij...,jc,io->oc...", parts[core], b, a)


def _with_lengths(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """`weight` with its rows (or columns, if `magnitude` is `[1, columns]`) scaled to the lengths `magnitude`."""
    import torch

    axis = 0 if by_rows(tuple(magnitude.shape), tuple(weight.shape)) else 1
    others = [i for i in range(weight.ndim) if i != axis]
    lengths = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * (magnitude.reshape(lengths.shape) / lengths)


def by_rows(magnitude: Shape, weight: Shape) -> bool:
    """Whether DoRA's lengths belong to the rows of a weight; otherwise to its columns."""
    return len(magnitude) == 1 or magnitude[0] == weight[0]


def missing_roles(kind: str, roles: set[str]) -> str | None:
    """What a change lacks to be one of `kind`, in words; None when it is whole."""
    if kind == "lora":
        names = {"up": "B (up)", "down": "A (down)"}
        lack = [name for role, name in names.items() if role not in roles]
        return lack[0] if lack else None
    if kind == "loha":
        needed = ["w1_a", "w1_b", "w2_a", "w2_b", *(["t1", "t2"] if roles & {"t1", "t2"} else [])]
    else:
        needed = [r for w in ("w1", "w2") if w not in roles for r in (f"{w}_a", f"{w}_b")]
    lack = [role for role in needed if role not in roles]
    return " and ".join(lack) if lack else None


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int:
    """The number that divides alpha; 0 where a change has no rank and alpha means nothing."""
    if kind == "lora":
        return shapes["down"][0] if shapes["down"] else 0
    order = ("w1_b",) if kind == "loha" else ("w2_b", "w1_b")
    return next((shapes[role][0] for role in order if shapes.get(role)), 0)


def result_shape(kind: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """Rows, columns (and the product of any further axes as part of the columns) of a change; None when its parts do
    not fit together. For forms of one tensor that one's shape."""
    if kind in TENSOR_ROLE:
        return shapes[TENSOR_ROLE[kind]]
    if any(len(shape) < 2 for role, shape in shapes.items() if role != "magnitude"):
        return None
    if kind == "lora":
        up, down, mid = shapes["up"], shapes["down"], shapes.get("mid")
        if mid:
            fits = mid[0] == math.prod(up[1:]) and mid[1] == down[0] and math.prod(down[2:]) == 1
            return (up[0], down[1] * math.prod(mid[2:])) if fits else None
        return (up[0], math.prod(down[1:])) if math.prod(up[1:]) == down[0] else None
    if kind == "loha":
        first, second = _pair_shape(shapes, "w1", "t1"), _pair_shape(shapes, "w2", "t2")
        return first if first == second else None
    one = _flat(shapes["w1"]) if "w1" in shapes else _pair_shape(shapes, "w1", "")
    two = _flat(shapes["w2"]) if "w2" in shapes else _pair_shape(shapes, "w2", "t2")
    return (one[0] * two[0], one[1] * two[1]) if one and two else None


def _flat(shape: Shape) -> Shape:
    return shape[0], math.prod(shape[1:])


def _pair_shape(shapes: Mapping[str, Shape], name: str, core: str) -> Shape | None:
    a, b, t = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(core)
    if len(a) != 2 or len(b) != 2:
        return None
    if t:
        return (a[1], b[1] * math.prod(t[2:])) if t[:2] == (a[0], b[0]) else None
    return (a[0], b[1]) if a[1] == b[0] else None
