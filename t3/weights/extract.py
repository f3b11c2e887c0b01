"""Extract what tuning changed: a LoRA, with full differences of what low rank cannot hold, from two whole models.

    report = extract(base, tuned, "t3_lora.safetensors")

For every parameter, `base + change` at strength 1 is `tuned` up to a relative error of the change, which is measured
and reported. One tensor of each model is in memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .. import __version__
from ..errors import T3Error
from ..files import check_output
from ..plan import Plan
from .extract_factors import ROUNDING, Factors, break_even, by_error, by_rank
from .extract_reader import Model, check_pair, open_model
from .extract_report import BF16_ROUNDING, Change, Extraction, finish
from .files import WeightFile
from .fingerprint import fingerprint
from .metadata import T3Metadata
from .peft_settings import SETTINGS_FILE
from .respell import unread_notes
from .spelling import Dialect, dialect_of
from .write import Entry, stored_type, tensor_bytes, write_safetensors

if TYPE_CHECKING:
    import torch

# 1 % of the change's energy may be lost. Two checkpoints in bfloat16 have more than that in their rounding where tuning
# changed the weights by 2 % or less: a closer copy would spend its rank on noise.
DEFAULT_ERROR = 0.1
_FINE_ERROR = 0.01  # below it, bfloat16 factors would take too much of what may be lost


class Cancelled(T3Error):
    """The caller asked to stop; nothing was written."""


@dataclass(frozen=True)
class Settings:
    """What `extract` was asked for, checked."""

    rank: int | None
    error: float
    max_rank: int | None
    dtype: str
    dialect: Dialect
    device: str


def extract(
    base: WeightFile | Mapping[str, torch.Tensor],
    tuned: WeightFile | Mapping[str, torch.Tensor],
    out: str | Path,
    *,
    rank: int | str = "auto",
    error: float = DEFAULT_ERROR,
    max_rank: int | None = None,
    plan: Plan | str | None = "auto",
    dialect: str = "comfyui",
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, str, Change | None], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Extraction:
    """Write what has to be added to `base` to get `tuned`; complete under its final name, or not at all.

    Args:
        base, tuned: whole transformers of the same shapes, each a `WeightFile` (from `open_weights`) or a mapping from
            names to tensors (a state dict, or one that loads on access), in any dialect, format and on any device.
        out: the .safetensors file to write.
        rank: "auto" for the lowest rank that meets `error`, layer by layer, or one number for all layers.
        error: relative Frobenius error of a layer's change that "auto" must meet, rounding included.
        max_rank: no layer gets more; layers that miss `error` for it are reported (`Extraction.missed`).
        plan: the plan `tuned` was tuned for (or a preset's name), written as metadata. "auto": what `tuned` carries,
            else the released plan for its kind of latents; None: none, for weights that are not T3-tuned.
        dialect: whose names are written, one of `spelling.DIALECTS`.
        dtype: of factors and matrices: "bfloat16", "float16", "float32", or "auto": bfloat16 unless `error` is so small
            that its rounding would count. Biases, norms and tables are float32 always.
        device: "cpu", "cuda", or "auto": a card if there is one.
        overwrite: whether `out` may be replaced.
        dry_run: check everything, tell what would be compared, and write nothing.
        progress: called with (tensors done, tensors in all, name of the last one, what was written for it or None).
        cancel: asked before every tensor; True stops with `Cancelled`. Whatever either callback raises stops as well.

    Raises:
        T3Error: anything that keeps the result from being right, before work starts where that can be known.
    """
    import torch

    start = time.perf_counter()
    settings = _settings(rank, error, max_rank, dtype, dialect, device)
    models = open_model(base, "BASE"), open_model(tuned, "TUNED")
    check_pair(*models)
    metadata, notes = _metadata(*models, plan)
    names = sorted(models[0].found.names)
    result = Extraction(notes, metadata, len(names), models[1].file.nbytes)
    result.matrices = sum(is_matrix(name, models[0].shape(name)) for name in names)
    final = check_output(_named(out, settings.dialect), overwrite)
    if dry_run:
        return result
    with _spool(final.parent) as spool:
        entries: list[Entry] = []
        for done, name in enumerate(names):
            if cancel and cancel():
                raise Cancelled("cancelled; nothing was written")
            try:
                change = _change(name, *models, settings, spool, entries)
            except torch.cuda.OutOfMemoryError as error:
                raise T3Error(f"the card has no room for {name!r}: free some, or take the device cpu.") from error
            if change:
                result.changes.append(change)
            else:
                result.unchanged.append(name)
            if progress:
                progress(done + 1, len(names), name, change)
        if not entries:
            raise T3Error("BASE and TUNED are equal in every number: there is nothing to extract.")
        result.metadata = _with_rank(metadata, result)
        result.notes += unread_notes([(change.name, change.form) for change in result.changes], settings.dialect)
        header = result.metadata.to_header()
        result.path = write_safetensors(final, entries, header, overwrite=overwrite)
    rounding = BF16_ROUNDING * math.sqrt(sum("BF16" in model.stored() for model in models))
    finish(result, settings.error if settings.rank is None else None, rounding, time.perf_counter() - start)
    return result


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter multiplies something, so that low rank may hold its change: no bias, norm or table."""
    return name.endswith(".weight") and len(shape) >= 2


def _named(out: str | Path, dialect: Dialect) -> Path:
    path = Path(out)
    if path.suffix.lower() != ".safetensors":
        raise T3Error(f"The output {path} must end in .safetensors, so that programs know what it is.")
    if dialect.name == "peft" and (path.parent / SETTINGS_FILE).exists():
        raise T3Error(f"{path.parent} holds an {SETTINGS_FILE}, whose alpha would scale the new file. Choose another.")
    return path


def _settings(rank: int | str, error: float, max_rank: int | None, dtype: str, dialect: str, device: str) -> Settings:
    import torch

    if rank != "auto" and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise T3Error(f'rank is {rank!r}; give "auto" or a whole number of at least 1, such as 64.')
    if not 0 < error < 1:
        raise T3Error(f"error is {error!r}; give a number between 0 and 1, such as {DEFAULT_ERROR}.")
    if max_rank is not None and max_rank < 1:
        raise T3Error(f"max_rank is {max_rank}; give at least 1.")
    if rank != "auto" and max_rank is not None:
        raise T3Error(f'rank {rank} and max_rank {max_rank} exclude each other: max_rank is for rank "auto".')
    if dtype not in ("auto", *ROUNDING):
        raise T3Error(f"unknown dtype {dtype!r}; known are auto, {', '.join(ROUNDING)}.")
    if dtype == "auto":
        dtype = "bfloat16" if rank != "auto" or error >= _FINE_ERROR else "float32"
    if rank == "auto" and error < 1.5 * ROUNDING[dtype]:
        finer = "" if dtype == "float32" else " Take float32."
        least = 1.5 * ROUNDING[dtype]
        raise T3Error(f"an error of {error:g} is below what {dtype} can hold, about {least:g}.{finer}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise T3Error(f"device {device!r} is not there; take cpu.")
    return Settings(None if rank == "auto" else int(rank), error, max_rank, dtype, dialect_of(dialect), device)


def _metadata(base: Model, tuned: Model, plan: Plan | str | None) -> tuple[T3Metadata, list[str]]:
    """What the new file will say of itself (without its rank), and what a user should know."""
    carried = tuned.found.t3
    notes = []
    if plan == "auto":
        plan = carried.plan
        if plan is None:
            channels = (tuned.found.config or {})["out_channels"]
            plan = Plan.for_latent_channels(channels)
            notes.append(
                f"TUNED does not say what plan it was tuned for: taken is the released one for models of {channels}-"
                f"channel latents, {plan.name!r}. State the plan if it was another, or none if TUNED is no T3 model"
            )
    elif isinstance(plan, str):
        plan = Plan.preset(plan)
    elif plan is not None and carried.plan not in (None, plan):
        notes.append(f"TUNED carries the plan {carried.plan.name!r}; written is {plan.name!r}, as asked")
    for model, role in ((base, "BASE"), (tuned, "TUNED")):
        if coarse := sorted(kind for kind in model.stored() if kind.startswith(("F8", "U8", "I8"))):
            notes.append(
                f"{role} is stored as {', '.join(coarse)}: its rounding is part of the difference, and takes rank. "
                "A bf16 or fp16 version gives a smaller, cleaner file"
            )
    mark = fingerprint(base.found.model, base.found.names, base.read)
    grid = carried.grid if plan else None
    return T3Metadata(plan=plan, grid=grid, base=mark, writer=f"t3.extract {__version__}"), notes


def _with_rank(metadata: T3Metadata, result: Extraction) -> T3Metadata:
    return dataclasses.replace(metadata, rank=max((change.rank for change in result.changes), default=0))


def _change(
    name: str, base: Model, tuned: Model, settings: Settings, spool: IO[bytes], entries: list[Entry]
) -> Change | None:
    """Compare one parameter; put what changed into the spool. None when it is the same."""
    import torch

    delta, norm, base_norm = _difference(name, base, tuned, settings.device)
    if norm == 0:
        return None
    module, dialect = settings.dialect.module(name.removesuffix(".weight").removesuffix(".bias")), settings.dialect
    first = len(entries)
    dtype = getattr(torch, settings.dtype)
    found = _factors(delta.flatten(1), settings, dtype) if is_matrix(name, tuple(delta.shape)) else None
    if found:
        down = found.down.reshape(-1, *delta.shape[1:])
        up = found.up.reshape(*found.up.shape, *[1] * (delta.ndim - 2))
        parts = {dialect.down: down, dialect.up: up}
        if dialect.underscored:  # kohya's tools want an alpha always
            parts["alpha"] = torch.tensor(float(found.rank))
        error, rank = found.error, found.rank
    else:
        stored = delta.to(dtype if is_matrix(name, tuple(delta.shape)) else torch.float32)
        parts = {"diff_b" if name.endswith(".bias") else "diff": stored}
        error, rank = (stored.float() - delta).norm().item() / norm, 0
    if not math.isfinite(error):
        raise T3Error(f"the change of {name!r} is too large for {settings.dtype}. Take float32.")
    for ending, tensor in parts.items():
        entries.append(_spooled(spool, f"{module}.{ending}", tensor))
    nbytes = sum(entry.nbytes for entry in entries[first:])
    relative = norm / base_norm if base_norm else None
    return Change(name, "lora" if found else "diff", tuple(delta.shape), rank, error, norm, relative, nbytes)


def _difference(name: str, base: Model, tuned: Model, device: str) -> tuple[torch.Tensor, float, float]:
    """Float32 `tuned - base`, its norm (0 where both are equal), and the norm of the base."""
    import torch

    old, new = (model.read(name).to(device).float() for model in (base, tuned))
    delta = new.sub(old)
    norms = delta.norm().item(), old.norm().item()
    if not all(map(math.isfinite, norms)):
        raise T3Error(f"{name!r} holds numbers that are not finite (NaN or infinite) in BASE or TUNED.")
    if norms[0] == 0:  # or so small that the squares of its numbers are none
        norms = float(torch.linalg.vector_norm(delta, dtype=torch.float64)), norms[1]
    return delta, *norms


def _factors(delta: torch.Tensor, settings: Settings, dtype: torch.dtype) -> Factors | None:
    """The change as a LoRA, or None where the difference itself is no larger."""
    limit = break_even(*delta.shape)
    if settings.rank is not None:
        return by_rank(delta, settings.rank, dtype) if settings.rank <= limit else None
    most = min(limit, settings.max_rank or limit)
    return by_error(delta, settings.error, most, dtype, best=most < limit)


@contextlib.contextmanager
def _spool(folder: Path) -> Iterator[IO[bytes]]:
    spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    try:
        yield spool
    finally:
        # What a full disk did not take would be tried, and fail, again.
        with contextlib.suppress(OSError):
            spool.close()


def _spooled(spool: IO[bytes], name: str, tensor: torch.Tensor) -> Entry:
    """Put a tensor into the temporary file; its entry reads it back. How many there are is known only at the end."""
    raw = tensor_bytes(tensor)
    at = spool.tell()
    try:
        spool.write(raw)
        spool.flush()
    except OSError as error:
        raise T3Error(
            f"the disk of the output did not take what was extracted so far ({error.strerror}). Free about twice the "
            "size of the output there, or write to another disk."
        ) from error
    again = functools.partial(_read_back, spool, at, len(raw))
    return Entry(name, stored_type(tensor.dtype), tuple(tensor.shape), again)


def _read_back(spool: IO[bytes], at: int, size: int) -> Iterable[bytes]:
    spool.seek(at)
    yield spool.read(size)
