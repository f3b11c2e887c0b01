"""The last stage: pack transformer, VAE, text encoder and tokenizer in float16 as a pipeline folder, sizes checked.

    python -m tools.small_model.export --dit output/small/retrofit/retrofit.safetensors --out t3/model

`t3/model` is the embedded default of `t3.generate`. The folder is in the diffusers layout; the transformer's file
carries the T3 plan in its header. `t3.embedded_files` writes it for ComfyUI.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from t3.weights import load_transformer, read_metadata

from .files import TRAINED, fresh_folder, say
from .init_dit import assemble

LARGEST_FILE, LARGEST_ALL = 16_000_000, 24_000_000  # bytes
_WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
CARD = """# The embedded model

Text to video in Wan2.1's architecture, in float16: a transformer of {transformer:.1f} million weights, a VAE of
{vae:.1f} million and a text encoder of {text_encoder:.1f} million. Plan: {plan}.

Trained from nothing by this project, on clips of moving shapes that a program draws together with their captions; no
other data, and no weights of anybody else's, went into it. It knows captions like "two small red circles moving left
on a black background" and nothing else. How it was made: `tools/small_model/README.md` in T3's repository.

Licence: Apache-2.0, as everything here.
"""


def plan_header(dit: Path) -> dict[str, str]:
    """The metadata of a file of weights: where the plan stands that they were tuned for."""
    with safe_open(dit, framework="pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key.startswith("t3")}


def pack(vae: Path, text: Path, dit: Path, out: Path) -> None:
    """Write the pipeline folder and a text that says what it is. Norms and modulation become float16 as well: the host
    computes in what it likes. `vae`: a folder with `vae` in it; `text`: one with `tokenizer` and `text_encoder`."""
    transformer = load_transformer(dit, dtype=torch.float32)
    assemble(vae, text, transformer, out, torch.float16)
    header = plan_header(dit)
    tensors = {name: tensor.half().contiguous() for name, tensor in transformer.state_dict().items()}
    save_file(tensors, out / _WEIGHTS, metadata={"format": "pt", **header})
    plan = read_metadata(header, dit).plan
    millions = {name: weights(out / name) / 1e6 for name in ("transformer", "vae", "text_encoder")}
    card = CARD.format(plan=f"{plan.name}, in the transformer's header" if plan else "none, full attention", **millions)
    (out / "README.md").write_text(card, encoding="utf-8")


def weights(folder: Path) -> int:
    """How many weights a folder's file holds."""
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a packed folder. Ends the program where a limit is passed."""
    found = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, size in found.items():
        if size > LARGEST_FILE:
            raise SystemExit(f"{name} is {size:,} bytes, more than {LARGEST_FILE:,}.")
    if sum(found.values()) > LARGEST_ALL:
        raise SystemExit(f"{folder} is {sum(found.values()):,} bytes, more than {LARGEST_ALL:,}.")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.export", description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, default=TRAINED / "folded", help="folder that fold_vae wrote")
    parser.add_argument("--text", type=Path, default=TRAINED / "text", help="folder that train_text wrote")
    parser.add_argument("--dit", type=Path, required=True, help="the trained transformer, as t3.retrofit wrote it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args(arguments)
    fresh_folder(args.out)
    pack(args.vae, args.text, args.dit, args.out)
    found = sizes(args.out)
    for name, size in found.items():
        say(f"{size:>12,}  {name}")
    say(f"{sum(found.values()):>12,}  in all")


if __name__ == "__main__":
    main()
