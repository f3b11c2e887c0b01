"""T3 Extract: what tuning added to a model, as a LoRA in ComfyUI's output folder."""

from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..t3 import Plan
from ..t3.errors import T3Error
from ..t3.plan import PRESETS
from ..t3.weights import open_weights
from ..t3.weights.extract import DEFAULT_ERROR, extract
from . import model_files
from .types import T3PlanType
from .verdict import verdict

FOLDERS = ("diffusion_models",)
AUTO, NONE = "auto", "none"
MOST_RANK = 4096
# More than the work on the largest matrix of a 14B takes on a card.
WORK_BYTES = 6 * 2**30
log = logging.getLogger("T3")


class T3Extract(io.ComfyNode):
    """Files in, a file out, by `t3.weights.extract`; no model is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="T3Extract",
            display_name="T3 Extract",
            category="T3/advanced",
            description=(
                "Makes a LoRA of a T3-tuned whole model: what tuning added to the model it was tuned from, at an error "
                "that is measured layer by layer. Writes it into output/loras, where loaders find it."
            ),
            search_aliases=["extract lora", "save lora", "lora from checkpoint", "difference", "svd", "retrofit"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "base",
                    options=model_files.listed(*FOLDERS),
                    tooltip="The model that tuning began with, a safetensors file in models/diffusion_models. Not in "
                    "fp8, if you have it otherwise: its rounding would become part of the LoRA.",
                ),
                io.Combo.Input(
                    "tuned",
                    options=model_files.listed(*FOLDERS),
                    tooltip="The whole T3-tuned model, of the same sizes as base.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/t3",
                    tooltip="Where to write, under ComfyUI's output folder. A number is added. Loaders find what lies "
                    "in loras.",
                ),
                io.Float.Input(
                    "error",
                    default=DEFAULT_ERROR,
                    min=0.001,
                    max=0.9,
                    step=0.001,
                    tooltip="How much of a layer's change may be lost, relative to the change. Less makes a larger "
                    "file. 0.1 loses 1 % of its energy.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=MOST_RANK,
                    tooltip="No layer gets a higher rank; the report says which miss the error for it. 0: no limit.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MOST_RANK,
                    tooltip="One rank for all layers, whatever the error. 0: layer by layer as high as the error asks.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "plan",
                    options=[AUTO, *(name for name in PRESETS if name != "dense"), NONE],
                    default=AUTO,
                    tooltip="The plan the model was tuned for, to be written into the file. auto: what the file of the "
                    "tuned model says, else the released plan of its family. none: it is not T3-tuned.",
                    advanced=True,
                ),
                T3PlanType.Input(
                    "custom_plan",
                    optional=True,
                    tooltip="A plan from the T3 Plan node; used instead of the choice above.",
                ),
            ],
            outputs=[
                io.String.Output("PATH", display_name="path", tooltip="The file that was written."),
                io.String.Output("REPORT", display_name="report", tooltip="Ranks, errors and sizes."),
            ],
        )

    @classmethod
    def validate_inputs(cls, base=None, tuned=None, rank=None, max_rank=None, filename_prefix=None) -> bool | str:
        """What can be refused before the graph runs; a string is the reason."""
        for entry in (base, tuned):
            if (found := model_files.verdict_on(entry, *FOLDERS)) is not True:
                return found
        return verdict(_check, base, tuned, rank, max_rank, filename_prefix)

    @classmethod
    def fingerprint_inputs(cls, base=None, tuned=None, **_) -> str:
        """Changes when one of the files does."""
        return f"{model_files.state(base, *FOLDERS)} {model_files.state(tuned, *FOLDERS)}"

    @classmethod
    def execute(
        cls, base, tuned, filename_prefix, error, max_rank, rank, plan, custom_plan: Plan | None = None
    ) -> io.NodeOutput:
        from_file, to_file = (open_weights(model_files.find(entry, *FOLDERS)) for entry in (base, tuned))
        _check(base, tuned, rank, max_rank, filename_prefix)
        bar: comfy.utils.ProgressBar | None = None

        def progress(done: int, total: int, name: str, change: object) -> None:
            nonlocal bar
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done)

        result = extract(
            from_file,
            to_file,
            _out(filename_prefix),
            rank=rank or "auto",
            error=error,
            max_rank=max_rank or None,
            plan=custom_plan or (None if plan == NONE else plan),
            device=_device(),
            progress=progress,
            cancel=_stop_if_cancelled,
        )
        lines = [
            f"{result.path}: {result.nbytes / 2**20:,.1f} MiB in {result.seconds:.0f} s",
            f"compared   {result.tensors} parameters, {result.matrices} of them matrices",
            *result.describe(),
        ]
        for note in result.notes:
            log.warning("T3 Extract: %s", note)
        return io.NodeOutput(str(result.path), "\n".join(lines))


def _check(
    base: str | None, tuned: str | None, rank: int | None, max_rank: int | None, filename_prefix: str | None
) -> None:
    """Raise `T3Error` for values that cannot be meant. None stands for what comes over a link."""
    if base is not None and base == tuned:
        raise T3Error(f"base and tuned are the same file ({base}): there is nothing to extract.")
    if rank and max_rank:
        raise T3Error(f"rank is {rank} and max_rank {max_rank}: set one of them to 0. max_rank is for rank 0.")
    if filename_prefix is not None:
        _folder(filename_prefix)


def _folder(filename_prefix: str) -> Path:
    """The folder that a prefix leads to. Raises `T3Error` where that is outside of the output folder."""
    import folder_paths

    output = Path(folder_paths.get_output_directory()).resolve()
    place = (output / filename_prefix).resolve()
    if not filename_prefix.strip() or filename_prefix.endswith(("/", "\\")) or not place.is_relative_to(output):
        raise T3Error(
            f"filename_prefix is {filename_prefix!r}; give a name under ComfyUI's output folder, such as 'loras/t3'."
        )
    return place.parent


def _out(filename_prefix: str) -> Path:
    """The next free file of this prefix, numbered as ComfyUI's Save nodes do."""
    import folder_paths

    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def _device() -> str:
    """Where to compute: the host's card, with models moved off it where need be."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cpu"
    comfy.model_management.free_memory(WORK_BYTES, device)
    return str(device)


def _stop_if_cancelled() -> bool:
    comfy.model_management.throw_exception_if_processing_interrupted()
    return False
