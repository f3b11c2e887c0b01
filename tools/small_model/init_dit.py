"""Stage 3a: put a pipeline folder together: the frozen VAE and text encoder, and a transformer of random weights.

    python -m tools.small_model.init_dit --vae FOLDED --text TEXT --out MODEL

The folder is in the diffusers layout (`model_index.json`), so that `t3.retrofit` and `t3.generate` take it as a model.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from . import plans
from .files import TRAINED, forget_paths, fresh_folder, say
from .text import TEXT_DIM

# Hosts take heads of 128 and infer the rest from shapes. In float16 this is 15.9 MB.
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_dim": 384,
    "num_layers": 10,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "patch_size": (1, 2, 2),
    "rope_max_seq_len": 1024,
}


def make_transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    """A transformer of random weights, the same for a seed everywhere: Xavier, and an output that starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**{**TRANSFORMER, **changes})
        for module in transformer.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
                torch.nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def assemble(vae: Path, text: Path, transformer: WanTransformer3DModel, out: Path, dtype: torch.dtype) -> None:
    """Write a pipeline folder. `vae`: a folder with `vae` in it; `text`: one with `tokenizer` and `text_encoder`."""
    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(text / "tokenizer", local_files_only=True),
        text_encoder=UMT5EncoderModel.from_pretrained(text / "text_encoder", local_files_only=True).to(dtype),
        vae=AutoencoderKLWan.from_pretrained(vae / "vae", torch_dtype=torch.float32).to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer.to(dtype),
    )
    pipe.save_pretrained(out)
    forget_paths(out)


def prepare_folder(root: Path) -> None:
    """Make `root`/model from the text encoder and the folded VAE in `root`, or else from those that were published,
    and `root`/plans."""
    for name in ("text", "folded"):
        if not (root / name).exists():
            say(f"{root / name}: copied from {TRAINED}")
            shutil.copytree(TRAINED / name, root / name)
    if not (root / "model" / "model_index.json").exists():
        assemble(root / "folded", root / "text", make_transformer(), root / "model", torch.float32)
    if not (root / "plans").exists():
        plans.write(fresh_folder(root / "plans"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.init_dit", description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, required=True, help="folder that fold_vae wrote")
    parser.add_argument("--text", type=Path, required=True, help="folder that train_text wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    fresh_folder(args.out)
    transformer = make_transformer(args.seed)
    assemble(args.vae, args.text, transformer, args.out, torch.float32)
    say(f"{args.out}: transformer of {sum(p.numel() for p in transformer.parameters()):,} weights")


if __name__ == "__main__":
    main()
