"""Clips to latents and text embeddings, once: the model's own encoders, the exact encode, shards to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..decoder import frame_count
from ..encoder import Encoder
from ..jobs import Clip as SampledClip
from ..jobs import Options
from ..pipeline import DTYPES, Engine, assemble, pick_device, pick_dtype
from ..plan import Grid, Plan
from ..sources import Sources
from ..vace import among_grey, pictures
from ..vae import WanEncoder, encode_frames
from ..vae.ranks import Ranks
from ..vae.shared_encode import encode_shared
from .buckets import Bucket, NoBucket, choose
from .clips import BadClip, Clip, inspect_clip, read_clip
from .conditioning import Conditioning
from .shards import FIRST, IMAGE, LAST_IMAGE, ShardWriter

Say = Callable[[str], None]
_ONE_MORE = "one more"
SAMPLED_FPS = 16.0  # as Wan2.1 samples are played
NAMED = 10  # faults that are named on the screen; all of them are in the index


@dataclass(frozen=True)
class Asked:
    """How clips are encoded: sizes in pixels, lengths in frames, at `fps` or as they are. conditions: for which of
    `FIRST` and `ENDS` latents are kept beside."""

    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...]
    fps: float | None = None
    upscale: bool = False
    text_tokens: int = 512
    missing_captions: str = "skip"
    memory: int | None = None
    conditions: tuple[str, ...] = ()


@dataclass
class Tally:
    """What became of the clips. `skipped` and `without_caption` by source."""

    encoded: int = 0
    before: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    without_caption: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: counts, and the first of each kind of fault by name."""
        lines = [f"{self.encoded} clips encoded" + (f", {self.before} were done before" if self.before else "")]
        if self.skipped:
            lines.append(f"{len(self.skipped)} skipped:")
            lines += [f"  {source}: {reason}" for source, reason in list(self.skipped.items())[:NAMED]]
        if self.without_caption:
            names = ", ".join(self.without_caption[:NAMED])
            lines.append(f"{len(self.without_caption)} without a caption: {names}")
        for faults in (self.skipped, self.without_caption):
            if len(faults) > NAMED:
                lines.append(f"  and {len(faults) - NAMED} more")
        return lines


class Encoders:
    """A model's VAE encoder, text encoder and, where it has one, image encoder. `mark` tells their weights from
    others'."""

    def __init__(self, sources: Sources, options: Options, text_tokens: int, ranks: Ranks | None = None) -> None:
        """ranks: processes that share the encode of every clip; rank 0 has the clips, and the others `help`."""
        self.device, self.ranks = pick_device(options.device), ranks
        dtype = DTYPES[pick_dtype(options.dtype, self.device)]
        self.pipe = pipe = assemble(sources, [None], dtype, options.shift)
        self.vae = pipe.vae
        self.encoder = WanEncoder.from_state_dict(self.vae.state_dict(), self.device, dtype)
        self._texts = _TextEncoder(pipe, self.device, text_tokens)
        self.conditioning = Conditioning.of(sources.transformer, {})
        encoders = [self.encoder, pipe.text_encoder]
        if self.conditioning.images:
            encoders.append(pipe.image_encoder.to(self.device))
        self.mark = _mark(*encoders)

    def latents(self, frames: torch.Tensor, memory: int | None, say: Say) -> torch.Tensor:
        """Latents `[C, T, H, W]` in the model's space of frames uint8 `[1, frames, H, W, 3]`."""
        if self.ranks is None:
            found = encode_frames(self.encoder, frames, memory=memory, say=say)
        else:
            self.ranks.words(_ONE_MORE)
            found = encode_shared(self.encoder, frames, self.ranks, memory=memory, say=say)
        return normalised(found, self.vae)[0]

    def given(
        self, frames: torch.Tensor, conditions: Sequence[str], memory: int | None, say: Say
    ) -> dict[str, torch.Tensor]:
        """What models are given of a clip, by the names of `shards.GIVEN`: frames uint8 `[1, frames, H, W, 3]`."""
        ends = {0: frames[0, 0], -1: frames[0, -1]}
        found = given_latents(ends, frames.shape[1], conditions, lambda clip: self.latents(clip, memory, say))
        return found | embedded_images(ends, self.pipe, self.conditioning.images, self.device)

    def grey(self, bucket: Bucket, memory: int | None, say: Say) -> torch.Tensor:
        """Latents `[C, T, H, W]` of a clip of middle grey."""
        return self.latents(among_grey(bucket.frames, bucket.height, bucket.width, {}), memory, say)

    def help(self, memory: int | None, say: Say) -> None:
        """On other ranks than 0: their share of every clip, until rank 0 calls `no_more`."""
        assert self.ranks is not None
        while self.ranks.words(None)[0] == _ONE_MORE:
            encode_shared(self.encoder, None, self.ranks, memory=memory, say=say)

    def no_more(self) -> None:
        """On rank 0: there are no more clips."""
        if self.ranks is not None:
            self.ranks.words(None)

    def text(self, caption: str) -> torch.Tensor:
        """The embedding `[tokens, text_dim]` of a caption, as the pipeline computes it, without its padding."""
        return self._texts(caption)


class _TextEncoder:
    """The pipeline's text encoding; captions that were seen are kept, since many clips may share one."""

    def __init__(self, pipe: Any, device: torch.device, tokens: int) -> None:
        self.pipe, self.device, self.tokens = pipe, device, tokens
        pipe.text_encoder.to(device)
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, caption: str) -> torch.Tensor:
        if caption not in self.known:
            embeds, _ = self.pipe.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=self.tokens, device=self.device
            )
            used = embeds[0].any(dim=-1).nonzero()
            self.known[caption] = embeds[0, : int(used[-1]) + 1 if len(used) else 1].cpu()
            if len(self.known) > 10_000:
                self.known.pop(next(iter(self.known)))
        return self.known[caption]


def normalised(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Latents in the VAE's space `[B, C, T, H, W]` as the transformer takes them: (latents - mean) / deviation."""
    mean, deviation = (
        torch.tensor(vae.config[name], dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return (latents - mean) / deviation


def given_latents(
    ends: Mapping[int, torch.Tensor], frames: int, conditions: Iterable[str], latents: Callable
) -> dict[str, torch.Tensor]:
    """`latents` of what is given of a clip of so many frames, by the conditions' names.

    ends: the pictures `[H, W, 3]` in uint8 at frame 0 and, where more than the first is given, at frame -1.
    """
    found = {}
    for name in conditions:
        height, width, _ = ends[0].shape
        found[name] = latents(among_grey(frames, height, width, {0: ends[0]} if name == FIRST else ends))
    return found


@torch.no_grad()
def embedded_images(
    ends: Mapping[int, torch.Tensor], pipe: Any, images: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The image encoder's embeddings `[tokens, dim]` of the first so many of `ends`, by the names of `shards.GIVEN`."""
    if not images:
        return {}
    shown = [Image.fromarray(ends[frame].numpy()) for frame in (0, -1)[:images]]
    return dict(zip((IMAGE, LAST_IMAGE), pipe.encode_image(shown, device).cpu(), strict=False))


def _mark(*modules: torch.nn.Module) -> str:
    """A short hash of a few numbers of each module, by which other weights are noticed."""
    sums = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items())[::7]:
            values = tensor.detach().flatten()[:16].float().cpu().tolist()
            sums.update(f"{name} {tuple(tensor.shape)} {[f'{x:.4g}' for x in values]}".encode())
    return sums.hexdigest()[:16]


def encode_clips(
    clips: Sequence[Clip], encoders: Encoders, writer: ShardWriter, asked: Asked, say: Say, watch: Callable = iter
) -> Tally:
    """Encode all clips that `writer` does not have yet. A clip that cannot be used is skipped, counted and named."""
    done, tally = writer.done, Tally()
    # Clips that were encoded before for a model that takes none of it.
    for stored in (entry for shard in writer.index["shards"] for entry in shard["clips"]):
        bucket = Bucket(stored["height"], stored["width"], stored["frames"])
        _add_grey(encoders, writer, stored["latents"], bucket, asked, say)
    for clip in watch(clips):
        if clip.source in done:
            tally.before += 1
            continue
        if clip.caption is None:
            tally.without_caption.append(clip.source)
            if asked.missing_captions == "skip":
                continue
        try:
            video, count = inspect_clip(clip.path, asked.fps, max(asked.frames))
            bucket = choose(video.height, video.width, count, asked.sizes, asked.frames, asked.upscale)
            frames = read_clip(clip.path, bucket, asked.fps)
        except (BadClip, NoBucket) as error:
            tally.skipped[clip.source] = str(error)
            writer.skip(clip.source, str(error))
            continue
        latents = encoders.latents(frames, asked.memory, say)
        _add_grey(encoders, writer, latents.shape, bucket, asked, say)
        writer.add(
            latents,
            encoders.text(clip.caption or ""),
            given=encoders.given(frames, asked.conditions, asked.memory, say),
            caption=clip.caption or "",
            source=clip.source,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            fps=asked.fps or video.fps,
        )
        tally.encoded += 1
    return tally


def _add_grey(
    encoders: Encoders, writer: ShardWriter, shape: Sequence[int], bucket: Bucket, asked: Asked, say: Say
) -> None:
    """Latents of a grey clip of this shape, for models that take them, once for each."""
    if encoders.conditioning.takes_grey and writer.lacks_grey(shape):
        writer.grey(encoders.grey(bucket, asked.memory, say))


def sample_clips(
    clips: Mapping[str, SampledClip], sources: Sources, writer: ShardWriter, options: Options, asked: Asked, say: Say
) -> Tally:
    """The model's own clips, sampled with dense attention, as a data set: those that `writer` does not have yet.

    clips: by name, all of one size and length. What the model is given beside a prompt comes from the clip's images.
    """
    tally, done, like = Tally(), writer.done, next(iter(clips.values()))
    grid = Grid.from_video(like.frames, like.height, like.width, sources.pixels_per_token)
    engine = Engine.load(sources, Plan.preset("dense"), options, grid, say)
    text = _TextEncoder(engine.pipe, engine.device, asked.text_tokens)
    conditioning, encode = Conditioning.of(sources.transformer, {}), Encoder(engine.vae, engine.device)

    def latents_of(frames: torch.Tensor) -> torch.Tensor:
        return normalised(encode(frames), engine.vae)[0]

    writer.empty_text(text(""))
    if conditioning.takes_grey:
        writer.grey(latents_of(among_grey(like.frames, like.height, like.width, {})))
    for name, clip in clips.items():
        if name in done:
            tally.before += 1
            continue
        latents, ends = engine.sample(clip), pictures(clip)
        given = given_latents(ends, clip.frames, asked.conditions, latents_of)
        writer.add(
            normalised(latents, engine.vae)[0],
            text(clip.prompt),
            given=given | embedded_images(ends, engine.pipe, conditioning.images, engine.device),
            caption=clip.prompt,
            source=name,
            frames=frame_count(latents.shape[2]),
            height=clip.height,
            width=clip.width,
            fps=asked.fps or SAMPLED_FPS,
        )
        tally.encoded += 1
        say(f"sampled {name}")
    return tally


def with_bar(what: str) -> Callable[[Sequence[Any]], Iterator[Any]]:
    """Something to pass a sequence through that shows how far it is, on standard error."""
    from tqdm import tqdm

    return lambda items: iter(tqdm(items, desc=what, unit="clip"))


def folder_facts(asked: Asked, mark: str) -> dict[str, Any]:
    """What a data set's index says of how it was encoded."""
    return {
        "sizes": [f"{height}x{width}" for height, width in asked.sizes],
        "frames": list(asked.frames),
        "fps": asked.fps,
        "encoders": mark,
        **({"conditions": list(asked.conditions)} if asked.conditions else {}),
    }


def target(folder: str | Path, facts: dict[str, Any], retry: bool) -> ShardWriter:
    """The data set to write to, new or to be continued; `retry` forgets which sources were skipped."""
    writer = ShardWriter(folder, facts=facts)
    if retry:
        writer.index["skipped"] = []
    return writer
