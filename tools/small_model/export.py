"""The last stage: pack transformer, VAE, text encoder and tokenizer in float16 as a pipeline folder, sizes checked.

    python -m tools.small_model.export --model MODEL --dit RUN/retrofit.safetensors --out PACKED
    python -m tools.small_model.export --model MODEL --dit RUN/retrofit.safetensors --out PACKED --single-files HOST

PACKED is in the diffusers layout; the transformer's file carries the T3 plan in its header. HOST gets the transformer
and the VAE under their original key names as single files, for hosts that load such; they are not part of the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from t3.weights import load_transformer

from .files import fresh_folder, say
from .init_dit import assemble

LARGEST_FILE, LARGEST_ALL = 16_000_000, 24_000_000  # bytes
_WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def plan_header(dit: Path) -> dict[str, str]:
    """The metadata of a file of weights: where the plan stands that they were tuned for."""
    with safe_open(dit, framework="pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key.startswith("t3")}


def pack(model: Path, dit: Path, out: Path) -> None:
    """Write the pipeline folder. Norms and modulation become float16 as well: the host computes in what it likes."""
    transformer = load_transformer(dit, dtype=torch.float32)
    assemble(model, model, transformer, out, torch.float16)
    header = plan_header(dit)
    tensors = {name: tensor.half().contiguous() for name, tensor in transformer.state_dict().items()}
    save_file(tensors, out / _WEIGHTS, metadata={"format": "pt", **header})


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a packed folder. Ends the program where a limit is passed."""
    found = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, size in found.items():
        if size > LARGEST_FILE:
            raise SystemExit(f"{name} is {size:,} bytes, more than {LARGEST_FILE:,}.")
    if sum(found.values()) > LARGEST_ALL:
        raise SystemExit(f"{folder} is {sum(found.values()):,} bytes, more than {LARGEST_ALL:,}.")
    return found


def single_files(packed: Path, out: Path, text_dim: int) -> None:
    """The transformer and the VAE under their original names, for hosts. The text width stands in the header."""
    from t3.weights import identify, open_weights
    from t3.weights.respell import respell
    from t3.weights.spelling import dialect_of
    from t3.weights.write import write_safetensors

    out.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"transformer": {"text_dim": text_dim}})
    for name, extra in (("transformer", {"config": config}), ("vae", {})):
        file = open_weights(packed / name / "diffusion_pytorch_model.safetensors")
        spelled = respell(file, identify(file), dialect_of("original"))
        write_safetensors(out / f"t3-small-{name}.safetensors", spelled.entries, {**spelled.metadata, **extra})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.export", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder with the frozen parts (init_dit)")
    parser.add_argument("--dit", type=Path, required=True, help="the trained transformer, as t3.retrofit wrote it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--single-files", type=Path, help="folder for the host's files")
    args = parser.parse_args(arguments)
    fresh_folder(args.out)
    pack(args.model, args.dit, args.out)
    found = sizes(args.out)
    for name, size in found.items():
        say(f"{size:>12,}  {name}")
    say(f"{sum(found.values()):>12,}  in all")
    if args.single_files:
        text_dim = json.loads((args.out / "transformer" / "config.json").read_text())["text_dim"]
        single_files(args.out, args.single_files, text_dim)


if __name__ == "__main__":
    main()
