"""Whether the changes in a file fit a model, from shapes alone: what can be refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import T3Error
from .adapter_file import AdapterFile, Piece, scale_of
from .arithmetic import TENSOR_ROLE, Shape, by_rows, result_shape
from .catalogue import name_of_width
from .dialects import DIT
from .files import WeightFile
from .identity import Identity, some
from .layout_dit import block_index

_NOUNS = {
    **{"lora": "LoRA", "diff": "diff", "lora+diff": "LoRA with diffs", "full": "full checkpoint"},
    **{"lokr": "LoKr", "loha": "LoHa", "dora": "DoRA"},
}


def noun_of(form: str) -> str:
    """What messages call weights of a form."""
    return _NOUNS.get(form, f"adapter ({form})")


def check_fit(file: WeightFile, found: Identity, shapes: Mapping[str, Shape]) -> None:
    """Raise `T3Error` unless everything in a file can be applied to a model.

    Args:
        file, found: the file and what `identify` says of it.
        shapes: canonical parameter name -> shape, of the whole model.
    """
    if found.component not in (DIT, "unknown"):
        raise T3Error(f"{file.path} is a {found.component} ({found.model}), not weights for a Wan transformer.")
    if found.problem:
        raise T3Error(found.problem)
    if found.quantised:
        raise T3Error(found.quantised)
    if found.adapter:
        _check_adapter(file, found, found.adapter, shapes)
    else:
        _check_full(file, found, shapes)


def _check_full(file: WeightFile, found: Identity, shapes: Mapping[str, Shape]) -> None:
    other = [name for name in shapes if name not in found.names] + [name for name in found.names if name not in shapes]
    pairs = {name: (file.shape(key), shapes[name]) for name, key in found.names.items() if name in shapes}
    wrong = [f"{name!r} is {list(a)} and needs {list(b)}" for name, (a, b) in pairs.items() if a != b]
    if other or wrong:
        first = wrong[0] if wrong else f"only one of the two has {some(other)}"
        raise T3Error(
            f"{file.path} does not fit the loaded model: {_sizes('This checkpoint', found, shapes)}"
            f"{len(wrong) + len(other)} tensors differ, first {first}."
        )


def _check_adapter(file: WeightFile, found: Identity, adapter: AdapterFile, shapes: Mapping[str, Shape]) -> None:
    absent = [piece.target for piece in adapter.pieces if piece.target not in shapes]
    for piece in adapter.pieces:
        scale_of(file, piece)  # raises where it is none; better now than once the model is loaded
    known = [piece for piece in adapter.pieces if piece.target in shapes]
    wrong = [odd for piece in known if (odd := misfit(file, piece, shapes[piece.target]))]
    if not absent and not wrong:
        return
    noun = noun_of(found.form)
    parts = []
    if wrong:
        parts.append(f"{len(wrong)} shapes do not fit, first {wrong[0]}")
    if absent:
        layers = 1 + max((index for name in shapes if (index := block_index(name)) is not None), default=-1)
        deeper = f" (it has {layers} blocks, the {noun} goes to {adapter.layers})" if adapter.layers > layers else ""
        parts.append(f"{len(absent)} parameters are not in the loaded model{deeper}, first {some(absent)}")
    sizes = _sizes(f"This {noun}", found, shapes)
    raise T3Error(f"{file.path} does not fit the loaded model: {sizes}{'; '.join(parts)}.")


def _sizes(what: str, found: Identity, shapes: Mapping[str, Shape]) -> str:
    """A sentence on the two widths where they differ; nothing where they are the same or one is unknown."""
    want = shapes["head.modulation"][-1] if "head.modulation" in shapes else None
    if None in (found.width, want) or found.width == want:
        return ""
    return f"{what} is for a model {name_of_width(found.width)}; the loaded model is {name_of_width(want)}. "


def misfit(file: WeightFile, piece: Piece, shape: Shape) -> str | None:
    """What is wrong with a piece's shapes for a parameter of `shape`, in words, or None."""
    shapes = piece.shapes(file)
    made = result_shape(piece.kind, shapes)
    if piece.kind in TENSOR_ROLE:
        fits = made == shape
    else:
        # Products come flat: a convolution's further axes are part of its columns.
        fits = made is not None and len(shape) >= 2 and made == (shape[0], math.prod(shape[1:]))
    lengths = shapes.get("magnitude")
    if fits and lengths is not None:
        fits = math.prod(lengths) == (shape[0] if by_rows(lengths, shape) else shape[1])
    if fits:
        return None
    if piece.kind == "lora" and lengths is None:
        up, down = piece.keys["up"], shapes["down"]
        return f"{up!r} {list(shapes['up'])} times A {list(down)} does not make {piece.target!r} {list(shape)}"
    if len(piece.keys) == 1:
        (key,) = piece.keys.values()
        return f"{key!r} is {list(file.shape(key))} and {piece.target!r} is {list(shape)}"
    listed = ", ".join(f"{role} {list(sizes)}" for role, sizes in shapes.items())
    return f"{listed} of {next(iter(piece.keys.values()))!r} do not make {piece.target!r} {list(shape)}"
