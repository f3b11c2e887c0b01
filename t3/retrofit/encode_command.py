"""`python -m t3.retrofit encode`: clips, or the model's own samples, to a data set for training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import check_sampling, quiet_libraries, say
from ..errors import T3Error
from ..parallel import faults
from ..parallel.world import World
from ..prompts import SEED_LIMIT, read_prompts
from ..video import frame_rate
from .buckets import check_buckets, parse_size
from .clips import list_clips
from .config import CONDITIONS, NONE
from .shards import ENDS, FIRST, check_target

if TYPE_CHECKING:
    from ..sources import Sources
    from ..vae.ranks import Ranks


def main(arguments: Sequence[str]) -> int:
    """Parse, run, and return the exit status. Under torchrun all its processes share the encode of each clip."""
    args = build_parser().parse_args(arguments)
    return faults.run("t3.retrofit encode", lambda world: encode(args, world), as_json=False)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="t3.retrofit encode",
        description="Encode clips, once, to what training reads. Run again with the same settings to go on. Under "
        "torchrun all processes share the encode of each clip.",
    )
    parser.add_argument(
        "clips", nargs="?", help="folder with captions as .txt beside the clips, or .csv, .jsonl, .json"
    )
    parser.add_argument("--own-samples", metavar="PROMPTS", help="instead: sample the prompts of a file, densely")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the data set")
    parser.add_argument("--model", help="diffusers folder or hub id; its VAE and text encoder are used")
    for part in ("dit", "vae", "text-encoder", "tokenizer", "image-encoder"):
        parser.add_argument(f"--{part}", metavar="PATH", help="as in t3.generate, in place of --model")
    parser.add_argument("--size", action="append", metavar="HxW", help="a bucket, repeatable (default 480x832)")
    parser.add_argument("--frames", action="append", type=int, help="a length, repeatable (default 81)")
    parser.add_argument(
        "--condition",
        action="append",
        choices=CONDITIONS[1:],
        help="also keep latents of the clip's first frame, or of its first and last (ends), for models that are given "
        "them; repeatable (what the model always takes is kept anyway)",
    )
    parser.add_argument("--fps", type=float, help="take frames at this rate (default: every frame)")
    parser.add_argument("--upscale", action="store_true", help="also take clips smaller than every size")
    parser.add_argument("--text-tokens", type=int, default=512, help="longest caption, in tokens")
    parser.add_argument(
        "--missing-captions", choices=("skip", "empty"), default="skip", help="what a clip without a caption becomes"
    )
    parser.add_argument("--retry-skipped", action="store_true", help="try again what an earlier run skipped")
    parser.add_argument("--dtype", default="auto", help="of the encoders: auto, bf16, fp16, fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", type=float, metavar="GB", help="working memory of the VAE's encode")
    sampling = parser.add_argument_group("own samples")
    sampling.add_argument("--steps", type=int, default=50)
    sampling.add_argument("--cfg", type=float, default=5.0)
    sampling.add_argument("--shift", type=float, default=5.0)
    sampling.add_argument("--seed", type=int, default=0)
    return parser


def encode(args: argparse.Namespace, world: World) -> int:
    """Encode or sample. 0 with at least one clip in the data set; raises `T3Error` otherwise."""
    if (args.clips is None) == (args.own_samples is None):
        raise T3Error("give either a list of clips, or --own-samples with a file of prompts.")
    if args.clips is not None and not args.clips:
        raise T3Error("the name of the clips is empty. Give a folder of clips, a .csv, a .jsonl or a .json.")
    _check_numbers(args)
    check_target(args.out)
    clips = list_clips(args.clips) if args.clips else []
    quiet_libraries()
    from ..jobs import Options
    from ..sources import find_sources
    from .encode import Asked

    sources = find_sources(
        model=args.model,
        dit=[args.dit] if args.dit else [],
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        image_encoder=args.image_encoder,
    )
    sizes = tuple(parse_size(size) for size in args.size or ["480x832"])
    memory = None if args.memory is None else int(args.memory * 1e9)
    asked = Asked(
        sizes,
        tuple(args.frames or [81]),
        args.fps,
        args.upscale,
        args.text_tokens,
        args.missing_captions,
        memory,
        _conditions(args.condition, sources),
    )
    check_buckets(asked.sizes, asked.frames, sources.pixels_per_token)
    if args.own_samples and world.size > 1:
        raise T3Error(
            f"own samples are made by one process, and {world.size} were started. Sample with t3.generate over all of "
            "them, and encode its clips."
        )
    world.start(args.device)
    options = Options(dtype=args.dtype, device=str(world.device or args.device), shift=args.shift)
    if args.own_samples:
        tally, total = _sample(args, sources, options, asked)
    else:
        from ..vae.ranks import Ranks

        ranks = Ranks() if world.size > 1 else None
        if not world.is_first:
            _help(sources, options, asked, ranks)
            return 0
        tally, total = _encode(clips, sources, options, asked, args, ranks)
    for line in tally.lines():
        say(line)
    if not total:
        raise T3Error(f"{args.out} holds no clip: none could be used.")
    say(f"{args.out}: {total} clips")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    check_sampling(args)
    if args.fps is not None:
        frame_rate(args.fps)
    if args.text_tokens < 1:
        raise T3Error(f"--text-tokens is {args.text_tokens}; use at least 1. Wan's models were trained with 512.")
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise T3Error(f"--memory is {args.memory:g} GB; use more than 0.")


def _conditions(asked: Sequence[str] | None, sources: Sources) -> tuple[str, ...]:
    """For which conditions latents are kept: those asked for, or what this kind of model always takes."""
    from .conditioning import Conditioning

    usual = [name for name in Conditioning.of(sources.transformer, {}).tensors if name in CONDITIONS]
    return tuple(name for name in CONDITIONS if name != NONE and name in (*(asked or ()), *usual))


def _help(sources: Sources, options: Any, asked: Any, ranks: Ranks | None) -> None:
    from .encode import Encoders

    Encoders(sources, options, asked.text_tokens, ranks).help(asked.memory, say)


def _encode(
    clips: list, sources: Sources, options: Any, asked: Any, args: argparse.Namespace, ranks: Ranks | None
) -> tuple[Any, int]:
    from .encode import Encoders, encode_clips, folder_facts, target, with_bar

    encoders = Encoders(sources, options, asked.text_tokens, ranks)
    with target(args.out, folder_facts(asked, encoders.mark), args.retry_skipped) as writer:
        writer.empty_text(encoders.text(""))
        tally = encode_clips(clips, encoders, writer, asked, say, with_bar("encoding"))
    encoders.no_more()
    return tally, _total(writer)


def _sample(args: argparse.Namespace, sources: Sources, options: Any, asked: Any) -> tuple[Any, int]:
    from .encode import sample_clips, target

    if len(asked.sizes) > 1 or len(asked.frames) > 1:
        raise T3Error("own samples have one --size and one --frames; run again for another, into another folder.")
    clips = _own_clips(args, sources, asked)
    sampled = {key: getattr(args, key) for key in ("steps", "cfg", "shift", "seed")}
    size = f"{asked.sizes[0][0]}x{asked.sizes[0][1]}"
    facts = {"model": sources.name, "size": size, "frames": asked.frames[0], "sampled": sampled}
    if asked.conditions:
        facts["conditions"] = list(asked.conditions)
    with target(args.out, facts, args.retry_skipped) as writer:
        tally = sample_clips(clips, sources, writer, options, asked, say)
    return tally, _total(writer)


def _own_clips(args: argparse.Namespace, sources: Sources, asked: Any) -> dict[str, Any]:
    """What to sample, by the prompts' names. Raises `T3Error` for a prompt without the images that are needed."""
    from ..generate import NEGATIVE_PROMPT
    from ..images import check_images
    from ..jobs import Clip

    clips, (height, width) = {}, asked.sizes[0]
    for number, prompt in enumerate(read_prompts(Path(args.own_samples))):
        seed = (args.seed + number) % SEED_LIMIT if prompt.seed is None else prompt.seed
        negative = NEGATIVE_PROMPT if prompt.negative is None else prompt.negative
        images = prompt.image, prompt.last_image
        clips[prompt.name] = Clip(
            prompt.text, negative, height, width, asked.frames[0], args.steps, args.cfg, seed, *images
        )
        for condition, key in ((FIRST, "image"), (ENDS, "last_image")):
            if condition in asked.conditions and getattr(prompt, key) is None:
                raise T3Error(
                    f"own samples keep what their model is given ({condition}), and the prompt {prompt.name!r} has no "
                    f'"{key}". Name a file there for each prompt.'
                )
    check_images(clips.items(), sources)
    return clips


def _total(writer: Any) -> int:
    return sum(len(shard["clips"]) for shard in writer.index["shards"])
