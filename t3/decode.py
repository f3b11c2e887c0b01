"""`python -m t3.decode`: saved latents to video."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli
from .errors import T3Error


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.decode`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.decode",
        description="Decode latents saved by t3.generate --latents-out, or by ComfyUI's SaveLatent, to a video.",
        epilog="exit status: 0 the video is on disk; 1 the decode failed; 2 bad arguments or input; 130 interrupted",
    )
    parser.add_argument("latents", type=Path, help=".latent file")
    parser.add_argument(
        "--vae", type=Path, required=True, help="VAE: safetensors, its folder, or a diffusers model folder"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help=".mp4, .mkv, .mov, or a folder for PNG frames")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    cli.add_video_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run("t3.decode", lambda: _decode(args), as_json=args.json)


def _decode(args: argparse.Namespace) -> int:
    vae_path = args.vae / "vae" if (args.vae / "vae").is_dir() else args.vae
    if not vae_path.exists():
        raise T3Error(f"--vae {args.vae}: no such file or folder.")
    from .latents import load_latents

    latents, metadata = load_latents(args.latents)
    ours: dict[str, Any] = metadata.get("t3") or {}
    args.fps = ours.get("fps", 30) if args.fps is None else args.fps
    from .weights import identify, open_weights
    from .weights.identity import require

    found = identify(open_weights(vae_path))
    require(found, "vae", "--vae")
    assert found.config is not None
    scale = found.config.get("scale_factor_spatial", 8)
    height, width = latents.shape[3] * scale, latents.shape[4] * scale
    cli.check_clip(args.out, width, height, args)

    watch = cli.Stopwatch()
    with watch.stage("load"):
        cli.quiet_libraries()
        from .decoder import check_latents, decode_frames, frame_count
        from .jobs import with_progress
        from .pipeline import DTYPES, pick_device, pick_dtype
        from .weights import load_vae

        device = pick_device(args.device)
        dtype = DTYPES[pick_dtype(args.dtype, device)]
        vae = load_vae(vae_path, dtype=dtype)
    check_latents(latents, vae)
    if latents.shape[0] > 1:
        cli.say(f"{args.latents} holds {latents.shape[0]} clips; decoding the first.")
    with watch.stage("decode"):
        frames = decode_frames(vae, latents[:1], device, cli.say, args.bit_depth)
        pieces = with_progress(frames, frame_count(latents.shape[2]))
        cli.write_clip(args.out, pieces, width, height, args, {"t3": ours} if ours else {})
    cli.say(f"wrote {args.out}")
    if args.json:
        result = {
            "ok": True,
            "out": str(args.out),
            "frames": frame_count(latents.shape[2]),
            "size": [args.crop or height, width],
            "seconds": watch.seconds,
            "peak_memory_bytes": cli.peak_memory(),
        }
        print(json.dumps(result, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
