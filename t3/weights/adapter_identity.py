"""Which model an adapter was made for, as far as its shapes and the parameters it changes say."""

from __future__ import annotations

import math

from .adapter_file import AdapterFile, read_adapter
from .arithmetic import result_shape
from .catalogue import CANNOT_TELL
from .dialects import DIT, looks_like
from .files import WeightFile
from .identity import Identity, some
from .layout_control import vace_index

# Parameters with as many rows as the model is wide.
_WIDE = ("self_attn.", "cross_attn.", "ffn.2.", "norm3.", "before_proj.", "after_proj.")


def adapter_width(file: WeightFile, adapter: AdapterFile) -> int | None:
    """Width of the model an adapter was made for, from what its pieces change; None when nothing tells."""
    for piece in adapter.pieces:
        inner = piece.target.split(".", 2)[-1]
        shape = result_shape(piece.kind, piece.shapes(file))
        if not shape:
            continue
        if inner == "modulation" or piece.target == "head.modulation":
            return shape[-1]
        if inner.startswith(_WIDE):
            return shape[0]
        if inner == "ffn.0.weight":
            return math.prod(shape[1:])
    return None


def _kind_and_model(adapter: AdapterFile, wide: int | None) -> tuple[str, str]:
    """Kind and model that the changed parameters speak for; "unknown" kind where any kind may take the adapter."""
    targets = [piece.target for piece in adapter.pieces]
    image = any("_img" in target or target.startswith("img_emb.") for target in targets)
    parts = {
        "vace": any(vace_index(target) is not None or target.startswith("vace_") for target in targets),
        "fun-camera": any(target.startswith("control_adapter.") for target in targets),
        "fun-control": any(target.startswith("ref_conv.") for target in targets),
        "flf2v": "img_emb.emb_pos" in targets,
    }
    kind = next((kind for kind, there in parts.items() if there), "i2v" if image else "unknown")
    size = {1536: "1.3b", 3072: "5b", 5120: "14b"}.get(wide or 0)
    if wide is None:
        return kind, "unknown"
    if kind not in ("unknown", "i2v", "flf2v"):
        return kind, f"wan2.1-{kind}-{size}" if size in ("1.3b", "14b") else f"wan-{kind}"
    if size is None:
        return kind, "custom"
    if size == "14b":
        return kind, f"wan2.1-{kind}-14b" if image else "wan-14b"
    return kind, {"1.3b": "wan2.1-t2v-1.3b", "5b": "wan2.2-ti2v-5b"}[size]


def identify_adapter(file: WeightFile) -> Identity:
    """Recognise a file of which some keys are an adapter's."""
    adapter = read_adapter(file)
    found = Identity(DIT, adapter.form, adapter.dialect, "unknown", matched=adapter.matched, adapter=adapter)
    found.refused, found.notes, found.naming = dict(adapter.refused), list(adapter.notes), adapter.naming
    found.width = adapter_width(file, adapter)
    found.kind, found.model = _kind_and_model(adapter, found.width)
    if found.model in CANNOT_TELL:
        found.notes.append(CANNOT_TELL[found.model])
    if not adapter.pieces:
        found.component, found.form = "unknown", "unknown"
        found.problem = refused_text(file, adapter.refused, looks_like(file.keys()))
    elif adapter.refused:
        found.problem = refused_text(file, adapter.refused, "")
    return found


def refused_text(file: WeightFile, refused: dict[str, str], guess: str) -> str:
    """One sentence for adapter keys that cannot be placed, by reason, with examples."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in refused.items():
        by_reason.setdefault(reason, []).append(key)
    parts = [f"{len(keys)} keys are {reason} (first {some(keys, 2)})" for reason, keys in by_reason.items()]
    tail = f"; {guess}" if guess else ""
    return f"{file.path} cannot be applied: {'; '.join(parts)}{tail}. Use a LoRA or diff made for a Wan transformer."
