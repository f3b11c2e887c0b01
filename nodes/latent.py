"""The T3 Empty Latent node: latents of a size that is legal for the model."""

from __future__ import annotations

import math

import comfy.model_management
import torch
from comfy_api.latest import io

from ..t3 import Plan
from ..t3.errors import T3Error
from ..t3.plan_facts import plan_lines
from .families import Video, pixel_inputs, size_inputs, video, widget_problem


class T3EmptyLatent(io.ComfyNode):
    """Empty latents for text to video, in 16 or 48 channels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3EmptyLatent",
            display_name="T3 Empty Latent",
            category="T3",
            description="Empty video latents of a size that is legal for the model, and what sampling them costs.",
            search_aliases=["empty video latent", "4k latent", "wan latent", "resolution", "size"],
            inputs=[
                *size_inputs(),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many clips to sample at once."),
                *pixel_inputs(),
            ],
            outputs=[
                io.Latent.Output("LATENT", display_name="latent", tooltip="Empty latents, for KSampler."),
                io.String.Output("REPORT", display_name="report", tooltip="Size, tokens, windows and work."),
            ],
        )

    @classmethod
    def validate_inputs(cls, family=None, frames=None, width=None, height=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        return widget_problem(family, frames, width, height)

    @classmethod
    def execute(cls, size, family, frames, batch_size, width=0, height=0) -> io.NodeOutput:
        clip = video(size, family, frames, width, height)
        shape = [batch_size, *clip.latent]
        try:
            samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        except (RuntimeError, MemoryError) as error:
            gigabytes = math.prod(shape) * 4 / 1e9
            raise T3Error(
                f"empty latents of {clip}, batch {batch_size}, take {gigabytes:,.1f} GB and do not fit. "
                "Choose a smaller size, fewer frames or a smaller batch."
            ) from error
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": clip.family.scale}, _report(clip))


def _report(clip: Video) -> str:
    plan = Plan.for_latent_channels(clip.family.channels)
    shape = " x ".join(map(str, clip.latent))
    return "\n".join([f"{clip}; latents {shape}, for {clip.family.name}", *plan_lines(plan, clip.grid)])
