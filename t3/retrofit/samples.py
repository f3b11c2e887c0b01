"""Clips sampled while training, with the averaged weights: the headless engine's sampler and the exact decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline

from ..decoder import decode_frames
from ..encoder import Encoder
from ..errors import T3Error
from ..images import load_image
from ..jobs import Clip
from ..pipeline import assemble
from ..plan import Grid
from ..prompts import safe_name
from ..scheduler import ReleasedScheduler
from ..sources import Sources
from ..vace import Control
from ..video import frame_rate, open_writer
from ..weights.catalogue import kind_of
from .conditioning import KINDS, taken
from .config import Samples
from .model import Found
from .session import Session
from .shards import ENDS


class Sampler:
    """The parts around the transformer, loaded once; captions are embedded at once and their encoder is let go."""

    def __init__(self, session: Session, negative: str) -> None:
        self.asked = asked = session.config.samples
        sources, device = session.found.sources, session.accelerator.device
        self.pipe = assemble(sources, [None], session.compute, asked.shift)
        self.vae = self.pipe.vae
        self.pipe.text_encoder.to(device)
        texts = {"do_classifier_free_guidance": False, "max_sequence_length": session.config.model.text_tokens}
        with torch.no_grad():
            self.prompts = [self.pipe.encode_prompt(prompt, **texts, device=device)[0] for prompt in asked.prompts]
            self.negative = self.pipe.encode_prompt(negative, **texts, device=device)[0]
        self.pipe.text_encoder = self.pipe.tokenizer = None
        self.given: list[dict[str, Any]] = [{} for _ in asked.prompts]
        if sources.is_vace or asked.images:
            self._give(sources, device)
        else:
            # Beside the transformer: the pipeline takes its device from the first module it finds.
            self.pipe.vae = None
        self.pipe.set_progress_bar_config(desc="sampling", unit="step", leave=False)

    def _give(self, sources: Sources, device: torch.device) -> None:
        """Prepare what the model is given for each prompt, and let the pipeline encode images in exact tiles."""
        encode, asked = Encoder(self.vae.to(device), device), self.asked
        control = Control(encode)
        for number, prompt in enumerate(asked.prompts):
            paths = [Path(files[number]) if files else None for files in (asked.images, asked.last_images)]
            size = asked.height, asked.width, asked.frames
            if sources.is_vace:
                self.given[number] = control.of(Clip(prompt, "", *size, asked.steps, asked.cfg, asked.seed, *paths))
            else:
                pictures = zip(("image", "last_image"), paths, strict=True)
                self.given[number] = {name: load_image(path, *size[:2]) for name, path in pictures if path}
        if sources.is_vace:
            return
        encode.for_pipeline()
        if not isinstance(self.pipe, WanImageToVideoPipeline):  # Wan2.2 5B is one model for both tasks
            parts = {**self.pipe.components, "image_encoder": None, "image_processor": None}
            self.pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        elif self.pipe.image_encoder is not None:
            self.pipe.image_encoder.to(device)

    @torch.no_grad()
    def latents(self, transformer: Any, number: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Latents `[1, C, T, H, W]` in the VAE's space, of prompt `number`, by the attention `transformer` has now."""
        asked, pipe = self.asked, self.pipe
        pipe.scheduler = ReleasedScheduler(asked.shift)
        pipe.transformer = transformer
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = pipe(
                prompt_embeds=self.prompts[number].to(device, dtype),
                negative_prompt_embeds=self.negative.to(device, dtype),
                height=asked.height,
                width=asked.width,
                num_frames=asked.frames,
                num_inference_steps=asked.steps,
                guidance_scale=asked.cfg,
                generator=torch.Generator("cpu").manual_seed(asked.seed + number),
                output_type="latent",
                **self.given[number],
            ).frames
        pipe.transformer = None
        config = self.vae.config
        mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        latents = out.float().cpu() * deviation + mean
        if not torch.isfinite(latents).all():
            raise T3Error("sampling gave values that are not numbers")
        return latents


def check_asked(found: Found, asked: Samples) -> None:
    """Raise `T3Error` where this model makes no samples, or takes other images than `[samples]` names."""
    if found.noise_range != (0.0, 1.0):
        raise T3Error(
            "[samples] needs a whole model, and one of two experts is trained. Leave prompts empty, and sample with "
            "t3.generate once both are: --t3-weights HIGH --t3-weights LOW."
        )
    kind = kind_of(found.config)
    needed = {"i2v": ("images",), "flf2v": ("images", "last_images")}.get(kind, ())
    takes = {"ti2v": ("images",), "vace": ("images", "last_images")}.get(kind, needed)
    if kind == "i2v" and ENDS in taken(found.config):
        takes = ("images", "last_images")
    for name in ("images", "last_images"):
        if name in needed and not getattr(asked, name):
            raise T3Error(
                f"[samples] lacks {name}: {KINDS[kind]} needs a file for each prompt. Or leave prompts empty."
            )
        if getattr(asked, name) and name not in takes:
            raise T3Error(f"[samples] has {name}, which {KINDS[kind]} does not take. Leave the key out.")
    Grid.from_video(asked.frames, asked.height, asked.width, found.sources.pixels_per_token)
    frame_rate(asked.fps)
    for path in (*asked.images, *asked.last_images):
        load_image(Path(path), asked.height, asked.width)


def sample(session: Session, sampler: Sampler, folder: Path) -> list[Path]:
    """Sample every prompt under the plan's own operator and write `folder/01-PROMPT.mp4`, ...; the paths."""
    operator, device = session.operator, session.accelerator.device
    was = operator.windows, operator.mean
    operator.windows, operator.mean = 1.0, None
    transformer, written = session.transformer.eval(), []
    if session.average is not None:
        session.average.swap()
    try:
        for number, prompt in enumerate(sampler.asked.prompts):
            latents = sampler.latents(transformer, number, device, session.compute)
            written.append(folder / f"{number + 1:02}-{safe_name(prompt)[:60].strip()}.mp4")
            frames = decode_frames(sampler.vae, latents, device, session.say, 8)
            size = {"width": sampler.asked.width, "height": sampler.asked.height, "fps": sampler.asked.fps}
            with open_writer(written[-1], overwrite=True, metadata={"prompt": prompt}, **size) as writer:
                for frame in frames:
                    writer.write(frame)
    finally:
        if session.average is not None:
            session.average.swap()
        transformer.train()
        operator.windows, operator.mean = was
    return written
