"""umT5's tokenizer from `tokenizer.json`, `spiece.model`, or the SentencePiece model inside a ComfyUI file.

The SentencePiece model is read here (a protocol-buffer file with a handful of fields we need) rather than through
transformers' T5 class, which fixes the unknown token at id 2 and byte fallback off; umT5 has neither.
Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import T3Error
from .files import WeightFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED = "spiece_model"
FILES = ("tokenizer.json", "spiece.model")
_UNIGRAM = 1
_USER_DEFINED = 4


@dataclass
class SentencePiece:
    """The parts of a SentencePiece model that decide how text becomes ids."""

    pieces: list[tuple[str, float]] = field(default_factory=list)
    user_defined: list[str] = field(default_factory=list)
    charsmap: bytes = b""
    model_type: int = _UNIGRAM
    unknown: int = 0
    byte_fallback: bool = False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each entry of one protocol-buffer message; fixed-width values as raw bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("truncated")
        yield tag >> 3, data[at : at + size]
        at += size


def parse_sentencepiece(data: bytes) -> SentencePiece:
    """Parse a serialized SentencePiece model. Raises ValueError or IndexError when it is none."""
    model = SentencePiece()
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:  # pieces
            entry = dict(_fields(value))
            score = entry.get(2, b"\0\0\0\0")
            piece = entry[1].decode("utf-8") if isinstance(entry.get(1), bytes) else ""  # type: ignore[union-attr]
            model.pieces.append((piece, struct.unpack("<f", score)[0] if isinstance(score, bytes) else 0.0))
            if entry.get(3) == _USER_DEFINED:
                model.user_defined.append(piece)
        elif number == 2:  # trainer_spec
            spec = dict(_fields(value))
            model.model_type = int(spec.get(3, _UNIGRAM))
            model.unknown = int(spec.get(40, 0))
            model.byte_fallback = bool(spec.get(35, 0))
        elif number == 3:  # normalizer_spec
            charsmap = dict(_fields(value)).get(2, b"")
            model.charsmap = charsmap if isinstance(charsmap, bytes) else b""
    if not model.pieces:
        raise ValueError("no pieces")
    return model


def tokenizer_from_sentencepiece(data: bytes, source: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of a serialized T5-style SentencePiece model; `</s>` is appended to every text.

    Raises T3Error when the bytes are no unigram model with `<pad>`, `</s>` and `<unk>`.
    """
    try:
        model = parse_sentencepiece(data)
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise T3Error(f"{source} is no SentencePiece model ({error}). Pass --tokenizer FOLDER with umT5's.") from error
    names = {piece for piece, _ in model.pieces}
    if model.model_type != _UNIGRAM or not {"<pad>", "</s>"} <= names or model.unknown >= len(model.pieces):
        raise T3Error(
            f"{source} is no T5 tokenizer (unigram with <pad> and </s>). Pass --tokenizer FOLDER with umT5's."
        )
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(Unigram(model.pieces, unk_id=model.unknown, byte_fallback=model.byte_fallback))
    if model.charsmap:
        backend.normalizer = normalizers.Precompiled(model.charsmap)
    # SentencePiece trims and joins white space, and starts every text with the word mark.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    if model.user_defined:
        backend.add_tokens([AddedToken(piece, normalized=False) for piece in model.user_defined])
    end = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=model.pieces[model.unknown][0],
    )


def _from_path(path: Path) -> PreTrainedTokenizerFast | None:
    if path.is_dir():
        inside = [path / name for name in FILES] + [path / "tokenizer" / name for name in FILES]
        path = next((file for file in inside if file.is_file()), path)
        if path.is_dir():
            return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise T3Error(f"Cannot read the tokenizer {path}: {error.strerror or error}.") from error
    if path.suffix != ".json":
        return tokenizer_from_sentencepiece(data, str(path))
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise T3Error(f"{path} is no tokenizer.json ({error}). Pass --tokenizer FOLDER with umT5's.") from error


def load_tokenizer(file: WeightFile, explicit: str | Path | None, *, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer that goes with a text encoder.

    Looked for in this order: `explicit`, the `spiece_model` embedded in the weights, `tokenizer.json` or `spiece.model`
    beside the weights, a `tokenizer` folder beside theirs (diffusers' layout).

    Args:
        vocabulary: rows of the encoder's token table; a tokenizer with more ids is refused.
    """
    found = None
    source = str(explicit or file.path)
    if explicit is not None:
        place = Path(explicit).expanduser()
        if not place.exists():
            raise T3Error(f"The tokenizer {place} does not exist.")
        found = _from_path(place)
        if found is None:
            raise T3Error(f"{place} holds neither {FILES[0]} nor {FILES[1]}. Pass umT5's tokenizer folder.")
    if found is None and (key := next((k for k in file if k.split(".")[-1] == EMBEDDED), None)):
        found = tokenizer_from_sentencepiece(bytes(file.read_raw(key).numpy().tobytes()), f"{file.path}: {key}")
    if found is None:
        folder = file.path if file.path.is_dir() else file.path.parent
        for place in (folder, folder.parent / "tokenizer"):
            if place.is_dir() and (found := _from_path(place)) is not None:
                source = str(place)
                break
    if found is None:
        raise T3Error(
            f"{file.path} has no tokenizer inside or beside it. Pass --tokenizer FOLDER with umT5's {FILES[0]} or "
            f"{FILES[1]}, or use ComfyUI's umt5_xxl file, which embeds it."
        )
    if len(found) > vocabulary:
        raise T3Error(
            f"The tokenizer from {source} has {len(found):,} tokens, but the text encoder only {vocabulary:,}: they do "
            "not belong together. Pass umT5's tokenizer folder as --tokenizer."
        )
    return found
