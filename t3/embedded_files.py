"""`python -m t3.embedded_files MODELS`: the embedded model as three files that ComfyUI's own loaders open.

The transformer and the VAE get the names Wan was published under. ComfyUI knows the text encoder in fixed shapes only;
the smallest umT5 of these is the base one, as wide as `HOST_TEXT` says. So the encoder is written in that shape, zeros
around its weights, and computes what it did; the transformer's text projection is widened by as many zeros.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli
from .embedded import embedded_folder
from .errors import T3Error
from .files import check_output
from .weights import identify, open_weights
from .weights.layout_text import text_layout
from .weights.respell import respell
from .weights.spelling import dialect_of
from .weights.write import Entry, is_written, tensor_entry, write_safetensors

if TYPE_CHECKING:
    import torch

FILES = {
    "transformer": "diffusion_models/t3-small-transformer.safetensors",
    "vae": "vae/t3-small-vae.safetensors",
    "text_encoder": "text_encoders/t3-small-text.safetensors",
}
# ComfyUI's umt5_config_base.json.
HOST_TEXT = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 256_384,
    "relative_attention_num_buckets": 32,
}
TEXT_PROJECTION = "text_embedding.0.weight"
SPACE = "\u2581"  # what SentencePiece writes for the space before a word


def host_file(folder: Path, part: str) -> tuple[list[Entry], dict[str, str]]:
    """What the host's file for one part holds: tensors to be written, and metadata.

    folder: a model like the embedded one, in diffusers' layout; part: a key of `FILES`.
    Raises `T3Error` where the folder holds something else.
    """
    if part == "text_encoder":
        return _text_encoder(folder), {}
    file = open_weights(folder / part)
    spelled = respell(file, identify(file), dialect_of("original"))
    if part == "vae":
        return spelled.entries, spelled.metadata
    width = HOST_TEXT["d_model"]
    entries = [_wider(entry, width) if entry.name == TEXT_PROJECTION else entry for entry in spelled.entries]
    # Where ComfyUI looks for the width of the text.
    return entries, {**spelled.metadata, "config": json.dumps({"transformer": {"text_dim": width}})}


def _wider(entry: Entry, width: int) -> Entry:
    return tensor_entry(entry.name, _padded(entry.tensor(), (entry.shape[0], width)))


def _padded(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`tensor` in the corner of zeros of this shape."""
    out = tensor.new_zeros(tuple(shape))
    out[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


def _text_encoder(folder: Path) -> list[Entry]:
    """Heads, channels and layers beyond the encoder's own are zeros, which add nothing to what passes by."""
    import torch

    file = open_weights(folder / "text_encoder")
    own = {name: file.read(name).float() for name in file}
    width = own["encoder.final_layer_norm.weight"].shape[0]
    pieces, rows = _pieces(folder / "tokenizer" / "tokenizer.json")
    own["shared.weight"] = own["shared.weight"][rows]
    entries = []
    for name, shape in (parameter[:2] for parameter in text_layout(HOST_TEXT).values()):
        tensor = own.pop(name, torch.zeros(0 if len(shape) == 1 else (0, 0)))
        if len(shape) == 1:
            # The norm divides by the mean square over all channels, of which zeros make less.
            entries.append(tensor_entry(name, _padded(tensor * math.sqrt(width / shape[0]), shape)))
        else:
            entries.append(tensor_entry(name, _padded(tensor.half(), shape)))
    if own:
        raise T3Error(f"{folder / 'text_encoder'} holds {next(iter(own))}, which ComfyUI's encoder has no place for.")
    tokenizer = _sentencepiece(pieces)
    entries.append(Entry("spiece_model", "U8", (len(tokenizer),), lambda: [tokenizer]))
    return entries


def _pieces(tokenizer: Path) -> tuple[list[str], list[int]]:
    """SentencePiece's pieces for a tokenizer of whole words, and for each the word's number: words after a space, with
    a capital too, and signs of punctuation, which stand at the end of a word."""
    vocabulary: dict[str, int] = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[word] for word in words] != list(range(len(words))) or words[:3] != ["<pad>", "</s>", "<unk>"]:
        raise T3Error(f"{tokenizer} is no tokenizer of whole words that begins with <pad>, </s> and <unk>.")
    pieces = {word: i for i, word in enumerate(words[:3])}
    pieces.update({SPACE + word if word.isalnum() else word: vocabulary[word] for word in words[3:]})
    pieces.update({SPACE + word.capitalize(): vocabulary[word] for word in words[3:] if word.isalnum()})
    return list(pieces), list(pieces.values())


def _sentencepiece(pieces: list[str]) -> bytes:
    """A serialized unigram model whose first three pieces are padding, end and unknown, all others equally likely."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise T3Error(
            f"writing the tokenizer needs a package that is missing ({error}): pip install protobuf"
        ) from None
    model = proto.ModelProto()
    kinds = {0: proto.ModelProto.SentencePiece.CONTROL, 1: proto.ModelProto.SentencePiece.CONTROL}
    kinds[2] = proto.ModelProto.SentencePiece.UNKNOWN
    for number, piece in enumerate(pieces):
        kind = kinds.get(number, proto.ModelProto.SentencePiece.NORMAL)
        model.pieces.add(piece=piece, score=0.0, type=kind)
    spec = model.trainer_spec
    spec.model_type = proto.TrainerSpec.UNIGRAM
    spec.vocab_size, spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = len(pieces), 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    return model.SerializeToString()


def write_files(folder: Path, models: Path, *, overwrite: bool = False) -> dict[Path, bool]:
    """Write the files for a model like the embedded one into ComfyUI's folder of models.

    Returns for each path whether it was written; those that held the same already are left as they are.
    Raises `T3Error` before the first is written where one of the places is taken or a package is missing.
    """
    files = {models / name: host_file(folder, part) for part, name in FILES.items()}
    missing = {path: content for path, content in files.items() if not is_written(path, *content)}
    for path, (entries, _) in missing.items():
        check_output(path, overwrite, need_bytes=sum(entry.nbytes for entry in entries))
    for path, content in missing.items():
        write_safetensors(path, *content, overwrite=overwrite)
    return {path: path in missing for path in files}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.embedded_files`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.embedded_files",
        description="Write the embedded model as files that ComfyUI's loaders open: transformer, VAE and text encoder "
        "(0.6 GB, nearly all of it zeros, since ComfyUI's smallest umT5 is that large).",
    )
    parser.add_argument("models", type=Path, help="ComfyUI's folder `models`")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist and hold something else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run("t3.embedded_files", lambda: _write(args), as_json=False)


def _write(args: Any) -> int:
    if not args.models.is_dir():
        raise T3Error(f"{args.models}: no such folder. Give ComfyUI's `models`.")
    for path, new in write_files(embedded_folder(), args.models, overwrite=args.overwrite).items():
        cli.say(f"wrote      {path}" if new else f"is there   {path}, with the same content")
    return 0


if __name__ == "__main__":
    sys.exit(main())
