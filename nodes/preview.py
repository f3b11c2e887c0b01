"""The T3 Plan Preview node: a picture of which tokens attend which, and of what that costs."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..t3 import Plan
from ..t3.attended import token_at
from ..t3.cost import model_cost, saving_warning
from ..t3.plan import PRESETS
from ..t3.plan_facts import plan_lines
from .families import Video, pixel_inputs, size_inputs, video, video_of_latents, widget_problem
from .types import T3PlanType

AUTO, ALL_LAYERS = "auto", -1
_NOT_CONNECTED: Any = object()


class T3PlanPreview(io.ComfyNode):
    """Draws a plan on a grid; the drawing is `t3.preview`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3PlanPreview",
            display_name="T3 Plan Preview",
            category="T3",
            description=(
                "Draws which tokens one token attends in each layer of a plan, and what that costs. Needs no model and "
                "no other node: press Run and look."
            ),
            search_aliases=["window preview", "attention map", "plan picture", "attention cost", "show windows"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "plan",
                    options=[AUTO, *PRESETS],
                    default=AUTO,
                    tooltip="Which plan to draw. auto: the released plan of the model's family, as in T3 Attention.",
                ),
                *size_inputs(" Not used if a latent is connected."),
                io.Int.Input(
                    "layer",
                    default=ALL_LAYERS,
                    min=ALL_LAYERS,
                    max=999,
                    tooltip="-1: every layer of the plan. Otherwise only this layer of the model, counted from 0.",
                ),
                *(
                    io.Float.Input(
                        f"token_{name}",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip=f"The token whose view is drawn: 0 is the {first}, 1 the {last}.",
                    )
                    for name, first, last in (
                        ("time", "first frame", "last"),
                        ("height", "top row", "bottom row"),
                        ("width", "left column", "right column"),
                    )
                ),
                *pixel_inputs(),
                T3PlanType.Input(
                    "custom_plan",
                    optional=True,
                    tooltip="A plan from the T3 Plan node; drawn instead of the choice above.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Latents whose size is taken instead of size, family and frames."
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="image", tooltip="The picture, also shown on this node."),
                io.String.Output("REPORT", display_name="report", tooltip="Windows and work of each layer, as text."),
            ],
        )

    @classmethod
    def validate_inputs(cls, family=None, frames=None, width=None, height=None, latent=_NOT_CONNECTED) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        return True if latent is not _NOT_CONNECTED else widget_problem(family, frames, width, height)

    @classmethod
    def execute(
        cls,
        plan,
        size,
        family,
        frames,
        layer,
        token_time,
        token_height,
        token_width,
        width=0,
        height=0,
        custom_plan=None,
        latent=None,
    ) -> io.NodeOutput:
        from ..t3.preview import draw_plan

        clip = video(size, family, frames, width, height) if latent is None else video_of_latents(_shape(latent))
        chosen = custom_plan or _plan(plan, clip)
        picture = draw_plan(
            chosen,
            clip.grid,
            token_at(clip.grid, (token_time, token_height, token_width)),
            clip.family.shape,
            clip.family.model,
            layers=None if layer == ALL_LAYERS else [layer],
            title=str(clip),
        )
        image = _tensor(picture)
        cost = model_cost(clip.family.shape, chosen, clip.grid)
        lines = [f"{clip}, for {clip.family.name}", *plan_lines(chosen, clip.grid)]
        if chosen != PRESETS["dense"] and (warning := saving_warning(cost.model_dense, cost.model_t3)):
            lines.append(warning)
        report = "\n".join(lines)
        return io.NodeOutput(image, report, ui=ui.PreviewImage(image, cls=cls))


def _shape(latent: dict[str, Any]) -> list[int]:
    return list(latent["samples"].shape)


def _plan(name: str, clip: Video) -> Plan:
    return Plan.for_latent_channels(clip.family.channels) if name == AUTO else Plan.preset(name)


def _tensor(picture) -> torch.Tensor:
    """A PIL image as the host's IMAGE: float32 `[1, H, W, 3]` in [0, 1]."""
    import numpy

    return torch.from_numpy(numpy.asarray(picture).copy()).to(torch.float32).div_(255)[None]
