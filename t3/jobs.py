"""Clips to make and where they go: what is asked for, what is done already, and the loop that does the rest."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batch import Batch
from .claims import clear
from .cli import Stopwatch, check_clip, say, write_clip
from .errors import T3Error
from .files import check_output
from .prompts import Prompt, output_path, pending, read_prompts, shard
from .video import SUFFIXES, check_video_path

if TYPE_CHECKING:
    from .parallel.team import Team
    from .pipeline import Engine

LATENTS_SUFFIX = ".latent"
DEFAULT_FOLDER = Path("output")


@dataclass(frozen=True)
class Clip:
    """One clip to sample. Sizes in pixels and frames; `image` and `last_image` are files to start from and end in."""

    prompt: str
    negative: str
    height: int
    width: int
    frames: int
    steps: int
    cfg: float
    seed: int
    image: Path | None = None
    last_image: Path | None = None


@dataclass(frozen=True)
class Options:
    """How to run, whatever is sampled."""

    dtype: str = "auto"
    device: str = "auto"
    offload: str = "auto"
    backend: str = "auto"
    memory: str = "auto"
    attention_memory: int | None = None
    compile: bool = False
    shift: float = 5.0


@dataclass(frozen=True)
class Job:
    """A clip and its files. `out` is None when only latents are wanted, `latents` when only the clip is."""

    name: str
    clip: Clip
    out: Path | None
    latents: Path | None


def make_jobs(args: argparse.Namespace, names: list[str] | None = None) -> tuple[list[Job], int]:
    """The jobs that are left to do, and how many are done already.

    names: of the jobs, where another process has found out which are left and has checked them.

    One `--prompt` makes one job. Of a `--prompts` file, this process's share makes one each, named after its prompt;
    those whose outputs exist are done (unless `--overwrite`): running the same command again finishes the rest, and
    removes what dead processes left claimed of them.
    Raises `T3Error` for bad prompts, a bad share, or outputs that cannot be written.
    """
    if args.prompts is None:
        if args.shard:
            raise T3Error("--shard splits the prompts of a --prompts file; with one --prompt leave it out.")
        out = None if args.no_decode else Path(args.out) if args.out else _free_default(args.format)
        job = Job(out.stem if out else "clip", _clip(args, None), _as_asked(out, args.out), args.latents_out)
        if names is None:
            _check(job, args)
        return [job], 0
    prompts = read_prompts(args.prompts)
    if args.shard:
        prompts = shard(prompts, *args.shard)
    suffix = "" if args.format == "png" else f".{args.format}"
    out_folder = None if args.no_decode else Path(args.out or DEFAULT_FOLDER)
    latents_folder = Path(args.latents_out) if args.latents_out else None
    _check_folder("--out", out_folder, SUFFIXES, " and say the kind of file with --format")
    _check_folder("--latents-out", latents_folder, (LATENTS_SUFFIX,))
    todo = list(prompts)
    if names is not None:
        todo = [p for p in prompts if p.name in set(names)]
    elif not args.overwrite:
        wanted = _wanted(out_folder, suffix, latents_folder)
        unfinished = {p.name for folder, s in wanted for p in pending(prompts, folder, s)}
        todo = [p for p in prompts if p.name in unfinished]
        for prompt in prompts:
            if prompt.name not in unfinished:
                # Who made it may have been killed before it gave it back.
                clear(output_path(prompt, *wanted[0]))
    jobs = []
    for prompt in todo:
        out = output_path(prompt, out_folder, suffix) if out_folder else None
        latents = output_path(prompt, latents_folder, LATENTS_SUFFIX) if latents_folder else None
        job = Job(prompt.name, _clip(args, prompt), out, latents)
        if names is not None:
            pass
        elif job.latents and job.latents.exists() and not args.overwrite:
            _check(Job(job.name, job.clip, job.out, None), args)  # its latents are there and will be reused
        else:
            try:
                _check(job, args)
            except T3Error:
                # Other processes go on while this one looks: what they finish meanwhile is not in the way.
                if args.overwrite or not Batch([], args).is_finished(job):
                    raise
                continue
        jobs.append(job)
    return jobs, len(prompts) - len(jobs)


def _check_folder(option: str, folder: Path | None, suffixes: Iterable[str], way: str = "") -> None:
    """Raise `T3Error` where the name of a file was given for the folder of many."""
    if folder is not None and folder.suffix.lower() in suffixes and not folder.is_dir():
        raise T3Error(
            f"{option} {folder} names one file, and --prompts makes one for each prompt. Name a folder, such as "
            f"{folder.with_suffix('')}{way}."
        )


def _wanted(out: Path | None, suffix: str, latents: Path | None) -> list[tuple[Path, str]]:
    return [(folder, s) for folder, s in ((out, suffix), (latents, LATENTS_SUFFIX)) if folder is not None]


def _as_asked(out: Path | None, text: str | None) -> Path | None:
    """`out`, or an error where the name asks for a kind of file that cannot be written (a Path drops a final slash)."""
    if out is not None and text:
        check_video_path(text)
        if text.endswith("/") and out.suffix:
            raise T3Error(f"--out {text}: a folder of frames cannot have a suffix. Use {out.with_suffix('')}/.")
    return out


def _free_default(suffix: str) -> Path:
    """`output/t3-00001.mp4`, or the next number that is free."""
    ending = "" if suffix == "png" else f".{suffix}"
    number = 1
    while (path := DEFAULT_FOLDER / f"t3-{number:05}{ending}").exists():
        number += 1
    return path


def _clip(args: argparse.Namespace, prompt: Prompt | None) -> Clip:
    def own(value: Any, usual: Any) -> Any:
        return usual if value is None else value

    text = prompt.text if prompt else args.prompt
    return Clip(
        prompt=text,
        negative=own(prompt.negative if prompt else None, args.negative_prompt),
        height=args.height,
        width=args.width,
        frames=args.frames,
        steps=args.steps,
        cfg=args.cfg,
        seed=own(prompt.seed if prompt else None, args.seed),
        image=own(prompt.image if prompt else None, args.image),
        last_image=own(prompt.last_image if prompt else None, args.last_image),
    )


def _check(job: Job, args: argparse.Namespace) -> None:
    if job.out is None and job.latents is None:
        raise T3Error("--no-decode leaves nothing to write; give --latents-out too.")
    if job.out is not None:
        check_clip(job.out, args.width, args.height, args)
    if job.latents is not None:
        check_output(job.latents, args.overwrite)


def check_room(jobs: Iterable[Job], latent_bytes: int) -> None:
    """Raise `T3Error` unless the disks have room for the latents of these jobs, of `latent_bytes` each: of all that are
    kept, and of one that waits for its decode. Found out after sampling, it would cost the sampling.
    """
    needed: dict[Path, tuple[Path, int]] = {}
    for job in jobs:
        path = job.latents or (job.out.with_name(job.out.stem + LATENTS_SUFFIX) if job.out else None)
        if path is None or path.exists():
            continue
        first, bytes_before = needed.get(path.parent, (path, 0))
        needed[path.parent] = first, bytes_before + latent_bytes if job.latents else max(bytes_before, latent_bytes)
    for path, count in needed.values():
        check_output(path, overwrite=True, need_bytes=count)


def run_jobs(
    engine: Engine, batch: Batch, args: argparse.Namespace, settings: dict[str, Any], watch: Stopwatch, team: Team
) -> list[dict[str, Any]]:
    """Make this team's share of the clips. Returns one result each: `status` is "done" or "failed", with `error` where
    it failed.

    A clip that fails does not stop the others, save where memory ran out, which the others would repeat, and where
    other ranks have a part in it: they wait for this one, so that all must end.
    """
    import torch

    results: list[dict[str, Any]] = []
    taken = batch.of_team(team)
    with contextlib.closing(taken):
        for number, job in enumerate(taken, 1):
            if len(batch.jobs) > 1 and team.is_leader:
                say(f"[{number}/{len(batch.jobs)}] {job.name}" + (f", by team {team.index}" if team.index else ""))
            result: dict[str, Any] = {"name": job.name, "prompt": job.clip.prompt, "seed": job.clip.seed}
            results.append(result)
            try:
                result.update(_run(engine, job, args, settings, watch, team), status="done")
            except torch.OutOfMemoryError as error:
                result.update(status="failed", error=f"out of memory: {_first_line(error)} {_LESS_MEMORY}")
                _end_team(team, job, result["error"], error)
                say(f"{job.name}: {result['error']}")
                break
            except (T3Error, OSError) as error:
                result.update(status="failed", error=_first_line(error))
                _end_team(team, job, result["error"], error)
                say(f"{job.name}: {result['error']}")
    return results


_LESS_MEMORY = "Try --memory lean, --offload model or group, --dtype fp8, or a smaller size."


def _end_team(team: Team, job: Job, text: str, error: BaseException) -> None:
    if team.size > 1:
        raise RuntimeError(f"{job.name}: {text}") from error


def _run(
    engine: Engine, job: Job, args: argparse.Namespace, settings: dict[str, Any], watch: Stopwatch, team: Team
) -> dict:
    if not team.is_leader:
        return _help(engine, job, watch, team)
    from .latents import save_latents

    metadata = {"t3": {**settings, **_plain(asdict(job.clip)), **_image_marks(job.clip), "fps": args.fps}}
    # Until the clip is written its latents are on disk: whatever happens to the decode, the sampling is not lost.
    stored = job.latents or _rescue_path(job, metadata)
    latents = None if args.overwrite else _stored_latents(stored, metadata)
    if latents is None and job.latents and not args.overwrite and job.latents.exists():
        raise T3Error(
            f"{job.latents} holds latents of other settings. Nothing was sampled: decode them (python -m t3.decode), "
            "name another --latents-out, or replace them with --overwrite."
        )
    team.share(latents is None)
    if latents is None:
        with watch.stage("sample"):
            latents = engine.sample(job.clip)
        if not job.latents:
            # Another process may have taken the name meanwhile, with these very latents too, which it will remove.
            stored = _rescue_path(job, metadata if args.overwrite else None)
        save_latents(stored, latents, metadata=metadata, overwrite=args.overwrite)
    else:
        say(f"{job.name}: sampled before with the same settings; using {stored}")
    if job.out is None:
        return {"latents": str(stored)}
    try:
        with watch.stage("decode"):
            write_clip(job.out, _frames(engine, latents, args.bit_depth, team), args.width, args.height, args, metadata)
    except BaseException:
        say(f"{job.name}: not decoded, but not lost: the latents are in {stored}. {_how_to_decode(engine, stored)}")
        raise
    if job.latents is None:
        stored.unlink(missing_ok=True)
    return {"out": str(job.out), **({"latents": str(stored)} if job.latents else {})}


def _help(engine: Engine, job: Job, watch: Stopwatch, team: Team) -> dict:
    """This rank's part in a clip that the team's leader writes."""
    from .decoder import help_decode

    if team.share():
        with watch.stage("sample"):
            engine.sample(job.clip)
    ranks = team.ranks()
    if job.out is not None and ranks is not None:
        with watch.stage("decode"):
            help_decode(engine.vae, engine.device, ranks)
    return {}


def _frames(engine: Engine, latents, bit_depth: int, team: Team) -> Iterator:
    from .decoder import decode_frames, frame_count

    frames = decode_frames(engine.vae, latents, engine.device, say, bit_depth, team.ranks())
    return with_progress(frames, frame_count(latents.shape[2]))


def with_progress(pieces: Iterable, total: int) -> Iterator:
    """Pass pieces of frames on, with a progress bar on standard error that counts frames and time left."""
    from tqdm import tqdm

    with tqdm(total=total, desc="writing", unit="frame") as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece))


def _rescue_path(job: Job, metadata: dict[str, Any] | None = None) -> Path:
    """Where a clip's latents wait for its decode: beside it, under a name that is free or, where their `metadata` are
    given, holds these very latents."""
    assert job.out is not None
    path = job.out.with_name(job.out.stem + LATENTS_SUFFIX)
    number = 1
    while path.exists() and not (metadata and _holds(path, metadata)):
        number += 1
        path = job.out.with_name(f"{job.out.stem}-{number}{LATENTS_SUFFIX}")
    return path


def _holds(path: Path, metadata: dict[str, Any]) -> bool:
    from .latents import load_latents

    with contextlib.suppress(T3Error):
        return _sampling(load_latents(path)[1].get("t3")) == _sampling(metadata["t3"])
    return False


def _sampling(facts: Any) -> Any:
    """Of what is known of a clip that which its latents depend on."""
    return {key: value for key, value in facts.items() if key != "fps"} if isinstance(facts, dict) else facts


def _image_marks(clip: Clip) -> dict[str, str]:
    """What the clip's images are, not only where."""
    images = {"image": clip.image, "last_image": clip.last_image}
    return {f"{name}_sha256": sha256(path.read_bytes()).hexdigest() for name, path in images.items() if path}


def _stored_latents(path: Path, metadata: dict[str, Any]):
    from .latents import load_latents

    return load_latents(path)[0] if path.exists() and _holds(path, metadata) else None


def _how_to_decode(engine: Engine, stored: Path) -> str:
    sources = engine.sources
    folder = sources.folder_now
    vae = sources.vae_file or (folder / "vae" if folder else "VAE")
    return f'Decode them with: python -m t3.decode "{stored}" --vae "{vae}" --out FILE'


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
