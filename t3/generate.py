"""`python -m t3.generate`: text (and an image) to video with T3 attention, without ComfyUI."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, cli
from .batch import Batch
from .embedded import NOTICE
from .errors import T3Error
from .images import check_images
from .jobs import Job, Options, check_room, make_jobs, run_jobs
from .memory import AUTO, MODES
from .parallel import faults
from .parallel.split import Split, Task, choose
from .parallel.team import form_team
from .parallel.world import World
from .plan import Grid, Plan
from .plan_choice import resolve_plan
from .report import fact_lines, run_facts
from .sources import Sources, find_sources

# Wan's own default, as the released T3 inference uses it.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
# The released settings; and the size the embedded model was tuned at, with what takes half a minute on two CPU cores.
DEFAULTS: dict[str, Any] = {
    "height": 2176,
    "width": 3840,
    "frames": 81,
    "steps": 50,
    "cfg": 5.0,
    "negative_prompt": NEGATIVE_PROMPT,
    "fps": 30,
}
EMBEDDED_DEFAULTS: dict[str, Any] = {
    "height": 224,
    "width": 320,
    "frames": 21,
    "steps": 25,
    "cfg": 2.0,
    "negative_prompt": "",
    "fps": 8,
}
EMBEDDED_PROMPT = "a red square moving left"


def build_parser() -> argparse.ArgumentParser:
    """The command line of `t3.generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m t3.generate",
        description="Generate video with a Wan model under T3 attention. With no model named, a small embedded "
        "one runs, which draws coloured shapes, at sizes and steps of its own. On several cards: "
        "torchrun --nproc-per-node N -m t3.generate ...",
        epilog="exit status: 0 everything asked for is on disk; 1 something failed; 2 bad arguments or input; "
        "130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"t3 {__version__}")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="diffusers folder or hub id, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    model.add_argument(
        "--dit",
        action="append",
        default=[],
        metavar="FILE",
        help="transformer as safetensors; twice for A14B, high noise first",
    )
    model.add_argument("--vae", metavar="FILE", help="VAE as safetensors")
    model.add_argument("--text-encoder", metavar="FILE", help="umT5 text encoder as safetensors")
    model.add_argument("--tokenizer", metavar="PATH", help="tokenizer folder, if the text encoder file embeds none")
    model.add_argument("--image-encoder", metavar="FOLDER", help="CLIP vision encoder for Wan2.1 image-to-video")
    model.add_argument(
        "--t3-weights",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="T3-tuned checkpoint, diff or LoRA; twice for A14B",
    )
    for name, what in (
        ("lora", "further LoRA; repeatable"),
        ("lora-high", "further LoRA for A14B's high-noise expert alone; repeatable"),
        ("lora-low", "the same for its low-noise expert"),
    ):
        model.add_argument(f"--{name}", action="append", default=[], metavar="FILE[:STRENGTH]", help=what)

    clip = parser.add_argument_group("clip")
    clip.add_argument("--prompt", help="what to show")
    clip.add_argument("--negative-prompt", help="what to avoid (default: Wan's own)")
    clip.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts: a line each, JSON or JSON lines; resumes; processes with the same list share it",
    )
    clip.add_argument("--shard", type=_shard, metavar="I/N", help="this process's share of --prompts, e.g. 0/4")
    clip.add_argument("--image", type=Path, help="image to start from")
    clip.add_argument("--last-image", type=Path, help="image to end in (image-to-video models and VACE)")
    clip.add_argument("--height", type=int, help="pixels (default: 2176)")
    clip.add_argument("--width", type=int, help="pixels (default: 3840)")
    clip.add_argument("--frames", type=int, help="4n+1 (default: 81)")
    clip.add_argument("--steps", type=int, help="sampling steps (default: 50)")
    clip.add_argument("--cfg", type=float, help="guidance; 1 is none and halves the time (default: 5)")
    clip.add_argument("--shift", type=float, default=5.0, help="of the noise levels (default: 5)")
    clip.add_argument("--seed", type=int, default=0, help="of the noise, drawn on the CPU (default: 0)")

    how = parser.add_argument_group("how to run")
    how.add_argument("--plan", default="auto", help="auto, wan2.1-4k, wan2.2-4k, dense, or a plan's JSON file")
    how.add_argument("--backend", default="auto", help="attention inside windows; `python -m t3.backends` lists them")
    how.add_argument(
        "--memory",
        default=AUTO,
        choices=MODES,
        help="fast: all heads at once; lean: few at a time, the same result in less memory; auto: by what is free",
    )
    how.add_argument(
        "--attention-memory", type=float, metavar="GIB", help="instead: bound on attention's working memory"
    )
    how.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32", "fp8"))
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    how.add_argument(
        "--offload", default="auto", choices=("auto", "none", "model", "group"), help="weights to main memory"
    )
    how.add_argument(
        "--split",
        default=AUTO,
        metavar="HOW",
        help="of the work over torchrun's processes: auto, or e.g. data=2,guidance=2,sequence=2: clips, the two "
        "predictions of a step, tokens",
    )
    how.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    how.add_argument("--dry-run", action="store_true", help="print what would be loaded, windows, cost; load nothing")

    parser.add_argument(
        "--out", metavar="PATH", help=".mp4, .mkv, .mov, or a folder for PNG frames; with --prompts a folder"
    )
    parser.add_argument("--format", default="mp4", choices=("mp4", "mkv", "mov", "png"), help="where --out names none")
    parser.add_argument(
        "--latents-out", type=Path, metavar="PATH", help="keep the latents (.latent); with --prompts a folder"
    )
    parser.add_argument("--no-decode", action="store_true", help="stop after the latents; decode later with t3.decode")
    cli.add_video_options(parser)
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0/4") from None


def settle(args: argparse.Namespace) -> tuple[Sources, Plan, str, Grid]:
    """Find the model, fill in the defaults that depend on it, and check everything that can be checked beforehand."""
    if args.prompt and args.prompts:
        raise T3Error("give --prompt or --prompts, not both.")
    if args.prompt is not None and not args.prompt.strip():
        raise T3Error("--prompt is empty; say what to show.")
    sources = find_sources(
        model=args.model,
        dit=args.dit,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        image_encoder=args.image_encoder,
        t3_weights=args.t3_weights,
        loras=args.lora,
        expert_loras=(args.lora_high, args.lora_low),
    )
    sources.check_experts()
    for name, value in (EMBEDDED_DEFAULTS if sources.embedded else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not (args.prompt or args.prompts):
        if not sources.embedded:
            raise T3Error("nothing to show: give --prompt or --prompts.")
        args.prompt = EMBEDDED_PROMPT
    _check_numbers(args)
    grid = Grid.from_video(args.frames, args.height, args.width, sources.pixels_per_token)
    plan, reason = resolve_plan(args.plan, sources)
    return sources, plan, reason, grid


def _check_numbers(args: argparse.Namespace) -> None:
    cli.check_sampling(args)
    if args.attention_memory is not None and not 0 < args.attention_memory < math.inf:
        raise T3Error(f"--attention-memory is {args.attention_memory:g} GiB; use more than 0.")
    if args.attention_memory is not None and args.memory != AUTO:
        raise T3Error(f"--attention-memory chooses the way by itself: leave --memory {args.memory} out.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    cli.let_segments_grow()
    return faults.run("t3.generate", lambda world: _generate(args, world), as_json=args.json)


def _generate(args: argparse.Namespace, world: World) -> int:
    sources, plan, reason, grid = settle(args)
    if args.dry_run and not world.is_first:
        return 0
    if not args.dry_run:
        world.start(args.device)
    jobs, done = _jobs_of_all(args, world)
    check_images(((job.name, job.clip) for job in jobs), sources)
    if world.is_first:
        check_room(jobs, sources.latent_bytes(grid))
    split = _split(args, world, sources, grid, len(jobs))
    passes = args.steps * (2 if args.cfg > 1 else 1)
    dtype = args.dtype if args.dtype != "auto" else "fp32" if sources.embedded else "bf16"
    facts = run_facts(sources, plan, reason, grid, dtype, passes, split)
    # What a dry run prints is its result; before a real run it is news.
    tell = print if args.dry_run and not args.json else world.say
    if sources.embedded:
        tell(NOTICE)
    for line in fact_lines(facts):
        tell(line)
    if args.prompts:
        tell(f"prompts    {done} done already, {len(jobs)} to do")
    result = {"ok": True, "version": __version__, **facts, "already_done": done, "clips": []}
    if args.dry_run or not jobs:
        result["dry_run"] = args.dry_run
        _print_result(result, args, world)
        return 0
    return _sample_all(args, sources, plan, grid, jobs, result, world, split[0])


def _jobs_of_all(args: argparse.Namespace, world: World) -> tuple[list[Job], int]:
    """What is left to do, as rank 0 found it: a clip that another has finished since is not missing from the list."""
    if args.dry_run or world.size == 1:
        return make_jobs(args)
    jobs, done = make_jobs(args) if world.is_first else ([], 0)
    names, done = world.share([[job.name for job in jobs], done])
    return (jobs if world.is_first else make_jobs(args, names)[0]), done


def _split(args: argparse.Namespace, world: World, sources: Sources, grid: Grid, clips: int) -> tuple[Split, str]:
    if (world.size == 1 and args.split == AUTO) or not clips:
        return Split(), "one process" if world.size == 1 else "nothing to do"
    heads = sources.transformer["num_attention_heads"]
    split, why = choose(args.split, world.size, Task(heads, grid.tokens, args.cfg > 1, clips))
    if args.compile and split.sequence > 1:
        raise T3Error(
            f"--compile does not go with tokens over {split.sequence} ranks, which exchange them inside each block. "
            "Leave it out, or use --split with guidance and data only."
        )
    return split, why


def _sample_all(
    args,
    sources: Sources,
    plan: Plan,
    grid: Grid,
    jobs: list,
    result: dict[str, Any],
    world: World,
    split: Split,
) -> int:
    watch = cli.Stopwatch()
    with watch.stage("load"):
        cli.quiet_libraries()
        from .pipeline import Engine

        memory = None if args.attention_memory is None else int(args.attention_memory * 2**30)
        options = Options(
            dtype=args.dtype,
            device=str(world.device or args.device),
            offload=args.offload,
            backend=args.backend,
            memory=args.memory,
            attention_memory=memory,
            compile=args.compile,
            shift=args.shift,
        )
        team = form_team(world, split)
        engine = Engine.load(sources, plan, options, grid, world.say, team)
    world.say(f"backend    {engine.backend_why}")
    settings = {
        "model": sources.name,
        "files": sources.fingerprint(),
        "plan": json.loads(plan.to_json()),
        "shift": args.shift,
        "dtype": engine.dtype,
    }
    batch = Batch(jobs, args)
    clips = run_jobs(engine, batch, args, settings, watch, team)
    mine = {"clips": clips if team.is_leader else [], "peak_memory_bytes": cli.peak_memory()}
    ranks = world.gather(mine)
    clips, elsewhere = batch.outcome([clip for rank in ranks for clip in rank.pop("clips")])
    failed = [clip for clip in clips if clip["status"] != "done"]
    result.update(
        ok=not failed and not elsewhere,
        elsewhere=elsewhere,
        clips=clips,
        device=str(engine.device),
        dtype=engine.dtype,
        backend={"name": engine.backend, "why": engine.backend_why},
        seconds={name: round(value, 3) for name, value in watch.seconds.items()},
        peak_memory_bytes=ranks[0]["peak_memory_bytes"],
        **({"by_rank": ranks} if world.size > 1 else {}),
    )
    for clip in clips:
        if clip["status"] == "done" and "by" not in clip:
            world.say(f"wrote      {clip.get('out') or clip['latents']}")
    if elsewhere:
        # All are waited for, unless this process gave up before.
        world.say(f"elsewhere  {len(elsewhere)} clips are in the hands of other processes: {', '.join(elsewhere[:10])}")
    world.say("seconds    " + ", ".join(f"{name} {value:.1f}" for name, value in watch.seconds.items()))
    _print_result(result, args, world)
    return 0 if result["ok"] else 1


def _print_result(result: dict[str, Any], args: argparse.Namespace, world: World) -> None:
    if args.json and world.is_first:
        cli.print_json(result, indent=2)


if __name__ == "__main__":
    sys.exit(main())
