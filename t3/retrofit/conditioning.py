"""What a model is given beside noise and text: nothing, a clip's first frame, or its first and last.

i2v, flf2v  channels beside the noise: a mask of what is given, and latents of the given frames with grey between;
            models with an image encoder also take its embedding of them
vace        control latents: what is kept, what is made (grey), a mask of what is made
ti2v (5B)   the clip's first latent frame without noise, at timestep 0; no other tensor

The clips' tensors are cached by `encode`. Masks are those of diffusers' pipelines and of `t3.vace`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..decoder import frame_count
from ..errors import T3Error
from ..vace import latent_mask, mask_of
from ..weights.catalogue import kind_of
from .config import NONE
from .shards import ENDS, FIRST, IMAGE, LAST_IMAGE, Stored

# What a kind of model can be given; by default the first of them.
TAKES = {
    "t2v": (NONE,),
    "ti2v": (NONE, FIRST),
    "i2v": (FIRST, ENDS),
    "flf2v": (ENDS,),
    "vace": (NONE, FIRST, ENDS),
}
KINDS = {
    "t2v": "a text-to-video model",
    "ti2v": "a Wan2.2 5B model",
    "i2v": "an image-to-video model",
    "flf2v": "a first-and-last-frame model",
    "vace": "a VACE model",
}
GIVEN_WORDS = {NONE: "nothing", FIRST: "the first frame", ENDS: "the first and the last frame"}
# diffusers' processor of cross-attention takes the last so many tokens for text, the others for the image.
TEXT_BESIDE_IMAGE = 512
_GIVEN = {NONE: (), FIRST: (0,), ENDS: (0, -1)}
_WORDS = {
    FIRST: "the latents of its first frame alone",
    ENDS: "the latents of its first and last frame alone",
    IMAGE: "the image encoder's embedding of its first frame",
    LAST_IMAGE: "the image encoder's embedding of its last frame",
}


class Given(NamedTuple):
    """For a batch of B clips, what the transformer is given beside noise and text; None for what it does not take.

    beside: `[B, channels, T, h, w]`, put after the noise's channels. control: `[B, channels, T, h, w]` for VACE.
    images: `[B * images, tokens, dim]`, an image encoder's. clean: bool `[B]`, the clips whose first latent frame is
    given without noise (5B).
    """

    beside: torch.Tensor | None = None
    control: torch.Tensor | None = None
    images: torch.Tensor | None = None
    clean: torch.Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """How a model is conditioned in training. `shares`: part of the clips trained with each condition, adding up to 1.

    channels: of the latents. mask_channels: of the mask beside them. images: how many embeddings of `image_shape`
    `[tokens or None, dim]` it takes.
    """

    kind: str = "t2v"
    shares: tuple[tuple[str, float], ...] = ((NONE, 1.0),)
    channels: int = 16
    mask_channels: int = 0
    images: int = 0
    image_shape: tuple[int | None, int] | None = None

    @classmethod
    def of(cls, transformer: Mapping[str, Any], asked: Mapping[str, float]) -> Conditioning:
        """For a transformer's config, with the shares that `[data] conditions` asks for (empty: the kind's default).

        Raises `T3Error` for a condition that the model does not take.
        """
        kind = kind_of(dict(transformer))
        takes = taken(transformer)
        for name in asked:
            if name not in takes:
                raise T3Error(
                    f"[data] conditions has {name!r}, which {KINDS.get(kind, 'this model')} does not take. It takes "
                    f"{' and '.join(map(repr, takes))}."
                )
        total = sum(asked.values())
        shares = tuple((name, share / total) for name, share in asked.items()) if asked else ((takes[0], 1.0),)
        channels, dim = transformer["out_channels"], transformer.get("image_dim")
        into = transformer["vace_in_channels"] if kind == "vace" else transformer["in_channels"]
        images = 0 if dim is None or kind not in ("i2v", "flf2v") else 2 if kind == "flf2v" else 1
        positions = transformer.get("pos_embed_seq_len")
        return cls(
            kind,
            shares,
            channels,
            into - 2 * channels if kind in ("i2v", "flf2v", "vace") else 0,
            images,
            (positions // 2 if positions else None, dim) if images and dim is not None else None,
        )

    @property
    def used(self) -> tuple[str, ...]:
        """The conditions that are trained with."""
        return tuple(name for name, share in self.shares if share)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that every clip must have."""
        frames = () if self.kind in ("t2v", "ti2v") else tuple(name for name in self.used if name != NONE)
        return (*frames, *(IMAGE, LAST_IMAGE)[: self.images])

    @property
    def takes_grey(self) -> bool:
        """Whether latents of grey clips, of every size, are needed."""
        return self.kind == "vace"

    @property
    def per_token(self) -> bool:
        """Whether some clips have a timestep for every token, which takes memory."""
        return self.kind == "ti2v" and FIRST in self.used

    def choose(self, u: float) -> str:
        """The condition of a clip for `u`, uniform in [0, 1)."""
        at = 0.0
        for name, share in self.shares:
            at += share
            if u < at:
                return name
        return self.used[-1]

    def check(self, clip: Stored, where: str, tokens: int) -> None:
        """Raise `T3Error` where a stored clip lacks what this model needs. `where` names it; tokens: text's length."""
        missing = [_WORDS[name] for name in self.tensors if name not in clip.given]
        if missing:
            raise T3Error(f"{where} lacks {' and '.join(missing)}, which {KINDS[self.kind]} is given. {self.command()}")
        if self.image_shape is not None:
            if tokens != TEXT_BESIDE_IMAGE:
                raise T3Error(
                    f"[model] text_tokens is {tokens}; a model that takes an image's embedding needs "
                    f"{TEXT_BESIDE_IMAGE}, which separates it from the text. Nearest: {TEXT_BESIDE_IMAGE}."
                )
            count, dim = self.image_shape
            found = clip.given[IMAGE]
            if found[1] != dim or count not in (None, found[0]):
                raise T3Error(
                    f"{where} has an image embedding of {list(found)} and this model takes [{count or 'any'}, {dim}]. "
                    "Encode the data with this model's image encoder."
                )
        if self.kind == "ti2v" and FIRST in self.used and clip.latents[1] < 2:
            raise T3Error(
                f"{where} has one latent frame, so that nothing is left to make where the first is given. Encode clips "
                "of 5 frames or more, or set [data] conditions = { none = 1 }."
            )

    def command(self) -> str:
        """How to make the data that this model needs."""
        frames = " ".join(f"--condition {name}" for name in self.used if name != NONE)
        return (
            "Encode the clips again, into another folder: python -m t3.retrofit encode CLIPS --out FOLDER --model "
            f"MODEL{' ' + frames if frames and self.kind != 'ti2v' else ''}, where MODEL is the model that you train."
        )

    def given(self, clips: Mapping[str, torch.Tensor], grey: torch.Tensor | None, chosen: Sequence[str]) -> Given:
        """What a batch is given. `clips`: its tensors by name, `[B, ...]`; `grey`: latents `[C, T, h, w]` of a grey
        clip; `chosen`: each clip's condition."""
        latents = clips["latents"]
        if self.kind == "ti2v":
            clean = torch.tensor([name == FIRST for name in chosen])
            return Given(clean=put(clean, latents.device)) if bool(clean.any()) else Given()
        if self.kind == "vace":
            assert grey is not None
            kept = torch.stack([grey if name == NONE else clips[name][i] for i, name in enumerate(chosen)])
            mask = put(torch.stack([control_mask(name, latents.shape[2]) for name in chosen]), latents.device)
            mask = mask.to(latents.dtype).view(len(chosen), 1, -1, 1, 1)
            mask = mask.expand(-1, self.mask_channels, -1, *latents.shape[3:])
            return Given(control=torch.cat([kept, grey.expand_as(kept), mask], dim=1))
        if self.kind in ("i2v", "flf2v"):
            kept = torch.stack([clips[name][i] for i, name in enumerate(chosen)])
            mask = torch.stack([image_mask(name, latents.shape[2], self.mask_channels) for name in chosen])
            mask = put(mask, latents.device).to(latents.dtype)[..., None, None].expand(-1, -1, -1, *latents.shape[3:])
            images = [clips[name] for name in (IMAGE, LAST_IMAGE)[: self.images]]
            # As the pipelines lay them out: each clip's first, then its last.
            embedded = torch.stack(images, dim=1).flatten(0, 1) if images else None
            return Given(beside=torch.cat([mask, kept], dim=1), images=embedded)
        return Given()


def taken(transformer: Mapping[str, Any]) -> tuple[str, ...]:
    """The conditions that a transformer of this config takes, its default first."""
    kind = kind_of(dict(transformer))
    if kind == "i2v" and transformer.get("image_dim") is not None:
        return (FIRST,)  # it has place for the embedding of one image
    return TAKES.get(kind, (NONE,))


def control_mask(condition: str, latent_frames: int) -> torch.Tensor:
    """VACE's mask `[T]`: 1 where the latent frame is to be made."""
    return latent_mask(mask_of(frame_count(latent_frames), _GIVEN[condition]), latent_frames)


def image_mask(condition: str, latent_frames: int, channels: int) -> torch.Tensor:
    """An image-to-video model's mask `[channels, T]`: 1 for each given frame of those that a latent frame stands for.

    The clip's first frame has a latent frame of its own, and counts in it `channels` times.
    """
    given = 1 - mask_of(frame_count(latent_frames), _GIVEN[condition])
    return torch.cat([given[:1].expand(channels), given[1:]]).view(latent_frames, channels).T


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on a device, without waiting for what the device is at."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def model_inputs(
    noisy: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor, given: Given, patch: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The transformer's arguments save text, of noisy and clean latents `[B, C, T, h, w]` and timesteps `[B]`."""
    if given.clean is not None:
        known = known_frames(given.clean, noisy.shape[2])
        noisy = torch.where(known, clean, noisy)
        # A timestep for every token, in the order of the tokens: frames, rows, columns.
        frames = torch.where(known[:, 0, :: patch[0], 0, 0], 0.0, timestep[:, None])
        timestep = frames.repeat_interleave((noisy.shape[3] // patch[1]) * (noisy.shape[4] // patch[2]), dim=1)
    if given.beside is not None:
        noisy = torch.cat([noisy, given.beside.to(noisy.dtype)], dim=1)
    inputs = {"hidden_states": noisy, "timestep": timestep}
    if given.control is not None:
        inputs["control_hidden_states"] = given.control
    if given.images is not None:
        inputs["encoder_hidden_states_image"] = given.images
    return inputs


def known_frames(clean: torch.Tensor, latent_frames: int) -> torch.Tensor:
    """Bool `[B, 1, T, 1, 1]`: the latent frames that a clip is given without noise."""
    first = torch.arange(latent_frames, device=clean.device) == 0
    return (clean[:, None] & first).view(len(clean), 1, -1, 1, 1)


def clip_errors(difference: torch.Tensor, given: Given) -> torch.Tensor:
    """Mean square `[B]` of a difference of velocities over what each clip's model has to make."""
    squares = difference.square()
    if given.clean is None:
        return squares.flatten(1).mean(1)
    made = ~known_frames(given.clean, difference.shape[2])
    counts = made.flatten(1).sum(1) * (difference[0].numel() // difference.shape[2])
    return (squares * made).flatten(1).sum(1) / counts
