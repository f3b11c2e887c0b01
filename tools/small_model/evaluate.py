"""Sample clips from captions with the headless engine, decode them, and measure whether they show what was asked.

    python -m tools.small_model.evaluate --model MODEL --dit RUN/dense-high.safetensors --plan dense --out RESULTS.json

Scene i of the split gives caption i; noise depends on the prompt's number and the seed, so that rows of a study can be
compared in pairs. The velocity error by noise band comes from `t3.retrofit`'s validation, not from here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from t3.errors import T3Error
from t3.jobs import Clip, Options
from t3.pipeline import Engine, pick_device
from t3.plan import Grid
from t3.plan_choice import resolve_plan
from t3.sources import find_sources

from .captions import caption
from .clip_vae import ClipVae
from .detector import Measured, detect, judge
from .encode import SIZES
from .files import say
from .scenes import LONGEST, SPLITS, Scene, scenes


def jobs(split: str, count: int, seeds: int, frames: int) -> list[tuple[int, Scene, str, int]]:
    """What to sample: `(scene number, scene, caption, noise seed)`, `seeds` times `count`."""
    found = scenes(split, 0, count)
    texts = [caption(scene, frames) for scene in found]
    return [
        (i, scene, text, 1000 * i + seed)
        for seed in range(seeds)
        for i, (scene, text) in enumerate(zip(found, texts, strict=True))
    ]


def sampled(engine: Engine, work: list, args) -> Iterator[tuple[list, torch.Tensor]]:
    """Batches of the work with their clips `[B, 3, T, H, W]` in [-1, 1]."""
    height, width = SIZES[args.size]
    dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
    # Not the engine's own, which may be in half precision: here the weights are cast at each use.
    loaded = AutoencoderKLWan.from_pretrained(args.model / "vae", torch_dtype=torch.float32).to(engine.device)
    vae = ClipVae(loaded, compiled=engine.device.type == "cuda")
    for start in range(0, len(work), args.batch):
        some = work[start : start + args.batch]
        clips = [Clip(text, "", height, width, args.frames, args.steps, args.cfg, seed) for _, _, text, seed in some]
        latents = engine.sample_batch(clips).to(engine.device, dtype)
        with torch.no_grad():
            pieces = [vae.decode(piece).float().clamp(-1, 1) for piece in latents.split(4)]
        yield some, torch.cat(pieces)


def row(number: int, seed: int, scene: Scene, measured: Measured, frames: int) -> dict:
    """What is kept of one clip."""
    right = judge(measured, scene, frames=frames)
    gaps = {"hue gap": measured.hue_gap, "height gap": measured.height_gap}
    return {
        "scene": number,
        "seed": seed,
        "right": right,
        "all": all(right.values()),
        "agreement": measured.agreement,
        **{name: None if value == float("inf") else round(value, 4) for name, value in gaps.items()},
    }


def summary(rows: list[dict]) -> dict[str, float]:
    """Percent right: all that the caption states, each attribute where stated, and the markers' agreement."""
    found = {"all": _percent([r["all"] for r in rows]), "agreement": _percent([r["agreement"] for r in rows])}
    for name in sorted({name for r in rows for name in r["right"]}):
        found[name] = _percent([r["right"][name] for r in rows if name in r["right"]])
    return found


def _percent(values: list[bool]) -> float:
    return round(100 * sum(values) / max(1, len(values)), 2)


def load_engine(args) -> Engine:
    """The engine for the model, weights and plan that are asked for. Raises `T3Error` as `t3.generate` does."""
    sources = find_sources(
        model=str(args.model),
        dit=[args.dit] if args.dit else [],
        t3_weights=[args.t3_weights] if args.t3_weights else [],
        loras=args.lora,
    )
    plan, reason = resolve_plan(args.plan, sources)
    say(f"plan {plan.name!r}, {reason}")
    grid = Grid.from_video(args.frames, *SIZES[args.size], sources.pixels_per_token)
    engine = Engine.load(sources, plan, Options(device=args.device, shift=args.shift, compile=args.compile), grid, say)
    engine.pipe.set_progress_bar_config(disable=True)
    return engine


def options() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder (VAE, text encoder; see init_dit)")
    parser.add_argument("--dit", help="transformer in place of the folder's own")
    parser.add_argument("--t3-weights")
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--plan", default="auto", help="auto, dense, or a JSON file")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--pictures", type=Path, help="also write first, middle and last frames of 16 clips as a PNG")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="high")
    parser.add_argument("--frames", type=int, default=LONGEST)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance; 1 is none")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = options().parse_args(arguments)
    try:
        pick_device(args.device)
        engine = load_engine(args)
    except T3Error as error:
        raise SystemExit(f"error: {error}") from None
    started, rows, shown = time.monotonic(), [], []
    for some, video in sampled(engine, jobs(args.split, args.prompts, args.seeds, args.frames), args):
        for (number, scene, _, seed), clip in zip(some, video, strict=True):
            rows.append(row(number, seed, scene, detect(clip), args.frames))
        if args.pictures and len(shown) < 16:
            shown += list(video[: 16 - len(shown)].cpu())
        say(f"{len(rows)} clips, {time.monotonic() - started:.0f} s: all right {summary(rows)['all']} %")
    found = summary(rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"summary": found, "settings": settings, "clips": rows}) + "\n")
    if args.pictures:
        contact_sheet(shown, args.pictures)
    say(json.dumps(found))


def contact_sheet(clips: list[torch.Tensor], path: Path) -> None:
    """First, middle and last frame of each clip side by side, four clips to a row, as one PNG at most 1920 wide."""
    from PIL import Image

    tiles = [torch.cat([clip[:, t] for t in (0, clip.shape[1] // 2, clip.shape[1] - 1)], 2) for clip in clips]
    tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % 2)
    sheet = torch.cat([torch.cat(tiles[i : i + 2], 2) for i in range(0, len(tiles), 2)], 1)
    image = Image.fromarray(((sheet + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
    image.thumbnail((1920, 10**6))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    main()
