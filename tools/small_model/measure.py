"""How good the detector and the VAE are: a table for real clips, VAE round trips and shuffled captions.

python -m tools.small_model.measure --model FOLDED --out TABLE.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from .clip_vae import ClipVae
from .detector import detect, judge
from .encode import SIZES
from .files import say
from .render import render
from .scenes import LONGEST, SPLITS, scenes
from .train_vae import round_trip


def table(split: str, size: tuple[int, int], frames: int, clips: int, device, model: ClipVae | None, dtype) -> dict:
    """Percent right by column ("real", "round trip", "shuffled") and attribute; everything the scenes hold counts."""
    drawn = scenes(split, 0, clips)
    columns: dict[str, dict[str, list[bool]]] = {}
    middle = size[1] // 2
    before = render([drawn[-1]], size, frames, device)
    for i, scene in enumerate(drawn):
        video = render([scene], size, frames, device)
        measured = detect(video[0])
        _count(columns, "real", measured, scene, frames)
        # Shuffled: this clip under the caption of the one before it; one clip's left half beside another's right.
        halves = torch.cat((before[..., :middle], video[..., middle:]), -1)
        _count(columns, "shuffled", measured, drawn[i - 1], frames, detect(halves[0]).agreement)
        before = video
        if model is not None:
            _count(columns, "round trip", detect(round_trip(model, video, dtype)[0]), scene, frames)
    return {
        name: {key: round(100 * sum(values) / len(values), 2) for key, values in rows.items()}
        for name, rows in columns.items()
    }


def _count(columns: dict, name: str, measured, scene, frames: int, agreement: bool | None = None) -> None:
    right = judge(measured, scene, everything=True, frames=frames)
    agrees = measured.agreement if agreement is None else agreement
    for key, value in {**right, "all": all(right.values()), "agreement": agrees}.items():
        columns.setdefault(name, {}).setdefault(key, []).append(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder with `vae` in it; without it no round trips")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--size", choices=SIZES, default="high")
    parser.add_argument("--frames", type=int, default=LONGEST)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    model = None
    if args.model:
        vae = AutoencoderKLWan.from_pretrained(args.model / "vae", torch_dtype=torch.float32).to(device)
        model = ClipVae(vae)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = table(args.split, SIZES[args.size], args.frames, args.clips, device, model, dtype)
    keys = list(dict.fromkeys(key for rows in found.values() for key in rows))
    say(f"{'percent right':<12}" + "".join(f"{name:>12}" for name in found))
    for key in keys:
        say(f"{key:<12} " + "".join(f"{rows.get(key, float('nan')):>12.2f}" for rows in found.values()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
