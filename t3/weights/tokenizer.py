"""umT5's tokenizer from `tokenizer.json`, `spiece.model`, or the SentencePiece model inside a ComfyUI file.

The SentencePiece model is turned into a fast tokenizer here rather than by transformers' T5 class, which fixes the
unknown token at id 2 and byte fallback off; umT5 has neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import T3Error
from .files import WeightFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED = "spiece_model"
FILES = ("tokenizer.json", "spiece.model")


def tokenizer_from_sentencepiece(data: bytes, source: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of a serialized T5-style SentencePiece model; `</s>` is appended to every text.

    Raises T3Error when the bytes are no unigram model with `<pad>`, `</s>` and `<unk>`.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise T3Error(f"{source} is no SentencePiece model ({error}). Pass --tokenizer FOLDER with umT5's.") from error
    pieces = [(entry.piece, entry.score) for entry in model.pieces]
    names = {piece for piece, _ in pieces}
    unknown = model.trainer_spec.unk_id
    unigram = model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM
    if not unigram or not {"<pad>", "</s>"} <= names or unknown >= len(pieces):
        raise T3Error(
            f"{source} is no T5 tokenizer (unigram with <pad> and </s>). Pass --tokenizer FOLDER with umT5's."
        )
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(Unigram(pieces, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback))
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    # SentencePiece trims and joins white space, and starts every text with the word mark.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    user_defined = [entry.piece for entry in model.pieces if entry.type == proto.ModelProto.SentencePiece.USER_DEFINED]
    if user_defined:
        backend.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])
    end = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=pieces[unknown][0],
    )


def embeddable(file: WeightFile, vocabulary: int) -> tuple[Path, bytes] | None:
    """The `spiece.model` beside a text encoder or in a `tokenizer` folder beside it or its folder, and its content.

    Needs no tokenizer library. Raises T3Error when it cannot be read, is no SentencePiece model, or has more pieces
    than `vocabulary`.
    """
    places = (file.folder, file.folder / "tokenizer", file.folder.parent / "tokenizer")
    path = next((place / FILES[1] for place in places if (place / FILES[1]).is_file()), None)
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise T3Error(f"Cannot read the tokenizer {path}: {error.strerror or error}.") from error
    count = _count_pieces(data)
    if not 0 < count <= vocabulary:
        what = f"has {count:,} pieces, and the text encoder {vocabulary:,}" if count else "is no SentencePiece model"
        raise T3Error(f"{path} {what}. Put umT5's {FILES[1]} there, or move this one away.")
    return path, data


def _count_pieces(data: bytes) -> int:
    """How many pieces a serialized SentencePiece model begins with: field 1 of the message, each with its length."""
    at = count = 0
    while data[at : at + 1] == b"\x0a":
        at, length, shift = at + 1, 0, 0
        while at < len(data):
            byte = data[at]
            at, length, shift = at + 1, length | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        at, count = at + length, count + 1
    return count if at <= len(data) else 0


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
