"""Stage 3: draw clips, encode them and their captions, and write shards that `t3.retrofit` trains on.

    python -m tools.small_model.encode --model MODEL --out DATA/low --size low --clips 8000 --seconds 90
    python -m tools.small_model.encode --model MODEL --out DATA/test --split test --size high --clips 512

Clip i of a split is the same everywhere, so shards are made where they are needed and not carried about. MODEL is a
folder with `vae`, `text_encoder` and `tokenizer` in it (see `init_dit`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from t3.retrofit.shards import ShardWriter

from .captions import caption
from .clip_vae import CONVOLUTIONS, ClipVae
from .files import Stopwatch, say
from .fold_vae import fingerprint
from .render import HIGH, LOW, render
from .scenes import LONGEST, SPLITS, scenes
from .text import TextModel

SIZES = {"high": HIGH, "low": LOW}
FPS = 16.0


@torch.no_grad()
def latents_of(model: ClipVae, video: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalised latents `[B, 16, T, H/8, W/8]`, float32, as the transformer sees them: the posterior's mean."""
    config = model.vae.config
    mean = model.encode(video.to(dtype))[0].float()
    offset, spread = (mean.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return (mean - offset) / spread


def encode(writer: ShardWriter, model: ClipVae, text: TextModel, plan: list[tuple[int, list[int]]], args) -> int:
    """Encode `(frames, scene numbers)` batches until they or the seconds end. Returns how many clips were written."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    height, width = SIZES[args.size]
    watch, written = Stopwatch(args.seconds or float("inf")), 0
    for frames, numbers in plan:
        if watch.used() > watch.limit:
            say(f"stopped after {watch.used():.0f} s")
            break
        some = [scenes(args.split, number, 1)[0] for number in numbers]
        captions = [caption(scene, frames) for scene in some]
        latents = latents_of(model, render(some, (height, width), frames, device), dtype).to(torch.bfloat16).cpu()
        embedded = [state.cpu() for state in text.embed(captions)]
        for number, words, clip, state in zip(numbers, captions, latents, embedded, strict=True):
            source = f"{args.split}/{number}"
            size = {"frames": frames, "height": height, "width": width, "fps": FPS}
            writer.add(clip, state, caption=words, source=source, **size)
        written += len(numbers)
    return written


def batches(start: int, clips: int, batch: int, mix: dict[int, float], still: int = 16) -> list[tuple[int, list[int]]]:
    """Scene numbers by batches, each of one length: clip i's length follows from i alone, in the shares of `mix`.

    Still images go `still` times as many to a batch.
    """
    lengths, shares = list(mix), list(mix.values())
    edges = [sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
    waiting: dict[int, list[int]] = {length: [] for length in lengths}
    made = []
    for i in range(start, start + clips):
        place = (i * 0.6180339887498949) % 1.0  # evenly spread, and in no step with anything else
        length = next(n for n, edge in zip(lengths, edges, strict=True) if place < edge or edge == edges[-1])
        waiting[length].append(i)
        if len(waiting[length]) == batch * (still if length == 1 else 1):
            made.append((length, waiting[length]))
            waiting[length] = []
    return made + [(length, rest) for length, rest in waiting.items() if rest]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.encode", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with vae, text_encoder and tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; goes on where one exists")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--size", choices=SIZES, default="high")
    parser.add_argument("--start", type=int, default=0, help="number of the first scene")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many; 0 is no limit")
    parser.add_argument("--frames", default=str(LONGEST), help="lengths and shares: 21, or 21:0.7,13:0.2,1:0.1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--convolution", choices=CONVOLUTIONS, default="2d")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    mix = {int(frames): float(share or 1) for frames, _, share in (p.partition(":") for p in args.frames.split(","))}
    torch.backends.cudnn.benchmark = True
    vae = AutoencoderKLWan.from_pretrained(args.model / "vae", torch_dtype=torch.float32).to(args.device)
    model = ClipVae(vae, args.convolution, compiled=torch.device(args.device).type == "cuda")
    text = TextModel(args.model, args.device)
    watch = Stopwatch(0)
    facts = {"vae": fingerprint(vae), "split": args.split, "size": args.size, "frames": args.frames}
    with ShardWriter(args.out, facts=facts) as writer:
        writer.empty_text(text.embed([""])[0])
        written = encode(writer, model, text, batches(args.start, args.clips, args.batch, mix), args)
    say(f"{args.out}: {written} clips in {watch.used():.0f} s")


if __name__ == "__main__":
    main()
