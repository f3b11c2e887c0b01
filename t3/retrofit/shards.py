"""Encoded clips on disk: latents and text embeddings in safetensors shards, and an index of them.

A data set is a folder with `index.json` and the shards it names. Clip `i` of a shard is two tensors:

    latents.{i}  [C, T, H, W], float16 or bfloat16, in the model's own latent space (normalised, noise has variance 1)
    text.{i}     [tokens, text_dim], what the text encoder gave for the caption, without padding

and, for models that are given more than text, any of

    first.{i}       [C, T, H, W], latents of the clip's first frame with grey after it
    ends.{i}        [C, T, H, W], latents of its first and last frame with grey between
    image.{i}       [tokens, image_dim], an image encoder's embedding of its first frame
    last_image.{i}  [tokens, image_dim], of its last frame

The header's entry "clips" is a JSON list with one object a clip: caption, source, frames, height, width, fps. The
index repeats it, so that sizes and captions are known without opening a shard, and it lists sources that were skipped.
The embedding of the empty caption, where one was given, is a file of its own; so are latents of grey clips, by size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import T3Error
from ..files import atomic_path, json_text
from .folder import (
    GREY,
    INDEX,
    VERSION,
    WriterLock,
    read_greys,
    read_index,
    size_name,
    told,
    write_greys,
    write_index,
)
from .tables import unknown

if TYPE_CHECKING:
    import torch

EMPTY_TEXT = "empty-text.safetensors"
FIRST, ENDS, IMAGE, LAST_IMAGE = "first", "ends", "image", "last_image"
GIVEN = (FIRST, ENDS, IMAGE, LAST_IMAGE)  # a clip's tensors beside latents and text
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ClipFacts:
    """What is known of an encoded clip without reading it. Sizes in pixels and frames of the video it came from."""

    caption: str
    source: str
    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Stored:
    """Where one clip lies, and the shapes of its tensors: latents `[C, T, H, W]`, text `[tokens, dim]`, and those of
    `GIVEN` that it has."""

    facts: ClipFacts
    shard: str
    place: int
    latents: tuple[int, ...]
    text: tuple[int, ...]
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Encoded(NamedTuple):
    """One clip, read: latents `[C, T, H, W]`, text `[tokens, text_dim]`, its facts, and those of `GIVEN` it has."""

    latents: torch.Tensor
    text: torch.Tensor
    facts: ClipFacts
    given: Mapping[str, torch.Tensor]


def check_target(folder: str | Path) -> None:
    """Raise `T3Error` where a new data set would be put among other files, such as a model's or the clips."""
    place = Path(folder)
    if not str(folder).strip():
        raise T3Error("the data set's folder has no name. Give one, such as data/480p.")
    if not place.is_dir() or (place / INDEX).exists():
        return
    for entry in sorted(place.iterdir()):
        # A run that was killed before its first index leaves these behind.
        if not any(entry.match(own) for own in (".*", "clips-*.safetensors", EMPTY_TEXT, GREY)):
            raise T3Error(
                f"{place} is no data set, and holds other files ({entry.name}). Name a folder of its own, such as "
                f"{place / 'encoded'}."
            )


class ShardWriter:
    """Write a data set, a shard at a time. A shard that is listed in the index is complete; nothing else counts.

    Opening a folder that has an index goes on where it ended: `done` holds the sources that need no work. `facts`
    describes how the clips were encoded (anything JSON can hold); a folder encoded otherwise is refused, and so is one
    that another writer has open. A writer that is used without a `with` block is to be closed.

        with ShardWriter(folder) as writer:
            writer.add(latents, text, caption="a dot", source="7.mp4", frames=21, height=448, width=640, fps=16)
    """

    def __init__(
        self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES, facts: dict[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self.shard_bytes = shard_bytes
        self.facts = facts or {}
        self._lock = WriterLock(self.folder)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        self.index: dict[str, Any] = {"t3_dataset": VERSION, "encoded": self.facts, "shards": [], "skipped": []}
        if (self.folder / INDEX).exists():
            self.index = read_index(self.folder)
            if self.index["encoded"] != self.facts:
                raise T3Error(
                    f"{self.folder} was encoded otherwise: {self.index['encoded']}, and now {self.facts} is asked for. "
                    "Name another folder, or use the former settings."
                )
        self._clips: list[Encoded] = []
        self._bytes = 0
        self._greys = set(read_greys(self.folder))

    @property
    def done(self) -> set[str]:
        """Sources that are in the data set, or were skipped for good."""
        stored = {clip["source"] for shard in self.index["shards"] for clip in shard["clips"]}
        return stored | {entry["source"] for entry in self.index["skipped"]} | {c.facts.source for c in self._clips}

    def add(
        self,
        latents: torch.Tensor,
        text: torch.Tensor,
        *,
        caption: str,
        source: str,
        frames: int,
        height: int,
        width: int,
        fps: float,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Add a clip (see the top of this file for shapes). Other dtypes than float16 and bfloat16 become bfloat16.

        given: what a model is given beside the text, by the names in `GIVEN`.
        Raises `T3Error` for another rank or name, or values that are not finite.
        """
        self._lock.check()
        given = given or {}
        if latents.ndim != 4 or text.ndim != 2:
            raise T3Error(
                f"{source}: latents of shape {list(latents.shape)} and text of {list(text.shape)}; expected "
                "[C, T, H, W] and [tokens, text_dim]."
            )
        for name, tensor in given.items():
            if name not in GIVEN:
                raise unknown(name, GIVEN, f"{source}: given")
            if tensor.shape != latents.shape if name in (FIRST, ENDS) else tensor.ndim != 2:
                wanted = list(latents.shape) if name in (FIRST, ENDS) else "[tokens, image_dim]"
                raise T3Error(f"{source}: {name} has the shape {list(tensor.shape)}; expected {wanted}.")
        kept = {name: _half(t, source, name) for name, t in {"latents": latents, "text": text, **given}.items()}
        facts = ClipFacts(caption, source, int(frames), int(height), int(width), float(fps))
        self._bytes += sum(tensor.nbytes for tensor in kept.values())
        self._clips.append(Encoded(kept.pop("latents"), kept.pop("text"), facts, kept))
        if self._bytes >= self.shard_bytes:
            self.flush()

    def skip(self, source: str, reason: str) -> None:
        """Note that a source gives no clip, and why. It is not tried again by a later run."""
        self._lock.check()
        self.index["skipped"].append({"source": source, "reason": reason})

    def empty_text(self, text: torch.Tensor) -> None:
        """Keep the embedding `[tokens, text_dim]` of the empty caption, for training without captions."""
        from safetensors.torch import save_file

        self._lock.check()
        file = self.folder / EMPTY_TEXT
        with told(file), atomic_path(file, overwrite=True) as temp:
            save_file({"text": _half(text, "the empty caption", "text")}, temp)

    def lacks_grey(self, shape: Sequence[int]) -> bool:
        """Whether there are no latents yet of a grey clip of this shape `[C, T, H, W]`."""
        return size_name(shape) not in self._greys

    def grey(self, latents: torch.Tensor) -> None:
        """Keep latents `[C, T, H, W]` of a clip of middle grey, which VACE models are given for what they make."""
        self._lock.check()
        kept = {**read_greys(self.folder), size_name(latents.shape): _half(latents, "the grey clip", "latents")}
        write_greys(self.folder, kept)
        self._greys = set(kept)

    def flush(self) -> None:
        """Write what has been added as a shard, and the index. Raises `T3Error` where the writer was closed."""
        self._lock.check()
        if self._clips:
            self._write_shard()
        write_index(self.folder, self.index)

    def _write_shard(self) -> None:
        from safetensors.torch import save_file

        tensors, clips = {}, []
        for i, clip in enumerate(self._clips):
            tensors.update({f"{name}.{i}": tensor for name, tensor in _tensors(clip).items()})
            clips.append(asdict(clip.facts))
        file = self.folder / f"clips-{len(self.index['shards']):05}.safetensors"
        # A shard of this name that no index lists is the rest of a run that was killed between the two writes.
        with told(file), atomic_path(file, overwrite=True) as temp:
            save_file(tensors, temp, metadata={"clips": json_text(clips)})
        shapes = [{name: list(tensor.shape) for name, tensor in _tensors(c).items()} for c in self._clips]
        listed = [{**facts, **shape} for facts, shape in zip(clips, shapes, strict=True)]
        self.index["shards"].append({"file": file.name, "clips": listed})
        self._clips, self._bytes = [], 0

    def close(self) -> None:
        """Write what is left, and let others write. Closing again does nothing."""
        if not self._lock.release.alive:
            return
        try:
            self.flush()
        finally:
            self._lock.release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # What was encoded before an interruption is good, and kept.
        self.close()


def join(folder: str | Path, parts: Sequence[str | Path]) -> None:
    """Make one data set in `folder` of several that were encoded alike, whose shards move there; they are gone then.

    Raises `T3Error` where `folder` holds a data set already, a part is none, or parts were encoded differently.
    """
    out, sets = Path(folder).absolute(), [open_shards(part) for part in parts]
    if (out / INDEX).exists():
        raise T3Error(f"{out} holds a data set already. Name another folder.")
    first = sets[0]
    for other in sets[1:]:
        if other.index["encoded"] != first.index["encoded"]:
            raise T3Error(
                f"{other.folder} was encoded as {other.index['encoded']} and {first.folder} as "
                f"{first.index['encoded']}; they cannot be one data set."
            )
    out.mkdir(parents=True, exist_ok=True)
    index = {**first.index, "shards": [], "skipped": [entry for one in sets for entry in one.index["skipped"]]}
    for one in sets:
        for shard in one.index["shards"]:
            name = f"clips-{len(index['shards']):05}.safetensors"
            (one.folder / shard["file"]).replace(out / name)
            index["shards"].append({**shard, "file": name})
    greys = {size: latents for one in sets for size, latents in read_greys(one.folder).items()}
    if greys:
        write_greys(out, greys)
    empty = next((one.folder / EMPTY_TEXT for one in sets if (one.folder / EMPTY_TEXT).exists()), None)
    if empty is not None:
        empty.replace(out / EMPTY_TEXT)
    write_index(out, index)
    for one in sets:
        shutil.rmtree(one.folder)


@dataclass
class Shards:
    """A data set that is open. `clips` are in the order of the index; `load` reads one."""

    folder: Path
    clips: list[Stored]
    index: dict[str, Any]
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def load(self, i: int) -> Encoded:
        """Clip `i`, on the CPU. Raises `T3Error` when its shard is missing or damaged."""
        clip = self.clips[i]
        handle = self._handle(clip.shard)
        try:
            names = ("latents", "text", *clip.given)
            tensors = {name: handle.get_tensor(f"{name}.{clip.place}") for name in names}
        except Exception as error:  # safetensors raises its own class for a name that is not there
            raise T3Error(f"{self.folder / clip.shard} lacks clip {clip.place}: {error}. Encode it again.") from None
        return Encoded(tensors.pop("latents"), tensors.pop("text"), clip.facts, tensors)

    def empty_text(self) -> torch.Tensor | None:
        """The embedding of the empty caption, `[tokens, text_dim]`, or None where the data set has none."""
        from safetensors.torch import load_file

        file = self.folder / EMPTY_TEXT
        return load_file(file)["text"] if file.exists() else None

    def grey(self, shape: Sequence[int]) -> torch.Tensor | None:
        """Latents of a grey clip of this shape `[C, T, H, W]`, or None where the data set has none."""
        return read_greys(self.folder).get(size_name(shape))

    def fingerprint(self) -> str:
        """A hash of what the index says: equal for equal data sets, whatever folder they lie in."""
        listed = json.dumps(self.index["shards"], sort_keys=True)
        return hashlib.sha256(listed.encode("utf-8")).hexdigest()[:16]

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            file = self.folder / name
            try:
                self._open[name] = safe_open(file, framework="pt")
            except Exception as error:
                raise T3Error(f"{file} cannot be read: {error}. Encode the data set again.") from None
        return self._open[name]


def open_shards(folder: str | Path) -> Shards:
    """Open a data set by its index; no tensor is read. Raises `T3Error` for a folder that is none, or damaged."""
    root = Path(folder).absolute()
    index = read_index(root)
    clips = [
        Stored(
            _facts(entry, root),
            shard["file"],
            place,
            tuple(entry["latents"]),
            tuple(entry["text"]),
            {name: tuple(entry[name]) for name in GIVEN if name in entry},
        )
        for shard in index["shards"]
        for place, entry in enumerate(shard["clips"])
    ]
    missing = sorted({clip.shard for clip in clips if not (root / clip.shard).is_file()})
    if missing:
        raise T3Error(f"{root} lacks {len(missing)} of its shards, such as {missing[0]}. Encode the data set again.")
    return Shards(root, clips, index)


def read_shards(folder: str | Path, clips: Sequence[int] | None = None) -> Iterator[Encoded]:
    """Every clip of a data set in order, or those numbered in `clips`, one at a time. Raises as `open_shards`."""
    shards = open_shards(folder)
    for i in range(len(shards.clips)) if clips is None else clips:
        yield shards.load(i)


def _tensors(clip: Encoded) -> dict[str, torch.Tensor]:
    return {"latents": clip.latents, "text": clip.text, **clip.given}


def _half(tensor: torch.Tensor, source: str, name: str) -> torch.Tensor:
    """A copy on the CPU in 16 bits. Raises `T3Error` for values that are not finite."""
    import torch

    half = tensor.dtype in (torch.float16, torch.bfloat16)
    tensor = tensor.detach().to("cpu", tensor.dtype if half else torch.bfloat16).contiguous().clone()
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise T3Error(f"{source}: {bad:,} of {tensor.numel():,} values of its {name} are not finite.")
    return tensor


def _facts(entry: dict[str, Any], root: Path) -> ClipFacts:
    try:
        return ClipFacts(**{name: entry[name] for name in ClipFacts.__dataclass_fields__})
    except KeyError as error:
        raise T3Error(f"{root / INDEX}: a clip lacks {error}. Encode the data set again.") from None
