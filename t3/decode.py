"""`python -m t3.decode`: saved latents to video."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli
from .errors import T3Error
from .parallel import faults
from .parallel.world import World

if TYPE_CHECKING:
    from .vae.ranks import Ranks


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.decode`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.decode",
        description="Decode latents saved by t3.generate --latents-out, or by ComfyUI's SaveLatent, to a video. "
        "Under torchrun, all processes share the decode: torchrun --nproc-per-node 2 -m t3.decode ...",
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
    """Run the command line; returns the exit status. Under torchrun all its processes share the decode."""
    args = build_parser().parse_args(argv)
    cli.let_segments_grow()
    return faults.run("t3.decode", lambda world: _decode(args, world), as_json=args.json)


def _decode(args: argparse.Namespace, world: World) -> int:
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
    world.start(args.device)

    watch = cli.Stopwatch()
    with watch.stage("load"):
        cli.quiet_libraries()
        from .decoder import check_latents, decode_frames, frame_count, help_decode
        from .jobs import with_progress
        from .pipeline import DTYPES, pick_device, pick_dtype
        from .weights import load_vae

        device = world.device or pick_device(args.device)
        dtype = DTYPES[pick_dtype(args.dtype, device)]
        vae = load_vae(vae_path, dtype=dtype)
    check_latents(latents, vae)
    if latents.shape[0] > 1:
        world.say(f"{args.latents} holds {latents.shape[0]} clips; decoding the first.")
    ranks = _ranks(world)
    shares: dict[str, Any] = {}
    with watch.stage("decode"):
        if not world.is_first:
            assert ranks is not None
            help_decode(vae, device, ranks)
            return 0
        frames = decode_frames(vae, latents[:1], device, cli.say, args.bit_depth, ranks, shares)
        pieces = with_progress(frames, frame_count(latents.shape[2]))
        cli.write_clip(args.out, pieces, width, height, args, {"t3": ours} if ours else {})
    cli.say(f"wrote {args.out}")
    if args.json:
        result = {
            "ok": True,
            "out": str(args.out),
            "frames": frame_count(latents.shape[2]),
            "size": [args.crop or height, width],
            "ranks": world.size,
            **({"shares": shares} if shares else {}),
            "seconds": watch.seconds,
            "peak_memory_bytes": cli.peak_memory(),
        }
        cli.print_json(result, indent=2)
    return 0


def _ranks(world: World) -> Ranks | None:
    if world.size == 1:
        return None
    from .vae.ranks import Ranks

    return Ranks()


if __name__ == "__main__":
    sys.exit(main())
