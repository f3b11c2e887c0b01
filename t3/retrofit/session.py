"""A training run ready to take steps: the model on its devices, what is trained, its optimisers, its data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from ..backends import Situation, choose
from ..cli import say
from ..errors import T3Error
from ..processor import compile_blocks
from . import model
from .batches import Feeder
from .config import Config
from .data import Clips, Layout, stay_on
from .ema import Average
from .model import Found
from .objectives import Objective
from .operator import Operator, install
from .optimizers import make_optimizers
from .output import Before, mark_of, small_before
from .teacher import Teacher
from .text import logits, shorten
from .trainable import make_trainable

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Session:
    """Everything a step needs. `objective` is what `accelerate` made of the model and its losses."""

    config: Config
    found: Found
    clips: Clips
    accelerator: Accelerator
    objective: Any
    optimizers: list[Any]
    operator: Operator
    parameters: list[torch.nn.Parameter]
    average: Average | None
    feeder: Feeder
    before: Before
    _held: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def held_out(self, number: int) -> dict[str, torch.Tensor]:
        """A held-out clip's tensors, by name, on the device; kept there if the clips to train on are."""
        if number in self._held:
            return self._held[number]
        found = {name: tensor.to(self.accelerator.device) for name, tensor in self.clips.held(number).items()}
        if self.feeder.resident:
            self._held[number] = found
        return found

    @property
    def transformer(self) -> Any:
        """The transformer itself, under whatever it has been wrapped in."""
        return self.accelerator.unwrap_model(self.objective).transformer

    @property
    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers themselves, under what `accelerate` made of them."""
        return [optimizer.optimizer for optimizer in self.optimizers]

    def update_weights(self) -> None:
        """A step of every optimiser."""
        for optimizer in self.optimizers:
            optimizer.step()

    def forget_gradients(self) -> None:
        """Before the next step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return COMPUTE[self.config.train.precision]

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        if self.main:
            say(text)


def make_accelerator(config: Config) -> Accelerator:
    """One process, or as many as `accelerate launch` or torchrun started. Raises `T3Error` for a missing device."""
    asked = config.train.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise T3Error('[train] device is "cuda", and torch sees no card here. Use "auto" or "cpu".')
    parts = [stage for stage in config.stages if not stage.flow and not stage.velocity and stage.inputs == "teacher"]
    ddp = DistributedDataParallelKwargs(
        # Where only attention outputs are compared, the rest of the model gets no gradient.
        find_unused_parameters=bool(parts),
        gradient_as_bucket_view=True,
    )
    precision = "bf16" if config.train.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=asked == "cpu", kwargs_handlers=[ddp])
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_sharded(config)
    return accelerator


def _check_sharded(config: Config) -> None:
    """Raise `T3Error` for what does not go with weights of which each process holds a part."""
    if config.train.optimizer == "muon":
        raise T3Error('[train] optimizer = "muon" needs whole matrices, and FSDP spreads them. Use "adamw", or DDP.')
    if config.trainable.what != "everything":
        raise T3Error("FSDP is for training everything. A LoRA's frozen weights fit a card: train it with DDP.")
    if any(stage.attention for stage in config.stages):
        raise T3Error(
            "the attention objective runs layers one by one, which FSDP does not allow. Set attention = 0 and use "
            "velocity, or train with DDP."
        )


def start(config: Config, found: Found, clips: Clips, accelerator: Accelerator) -> Session:
    """Load the model and put everything in place. Raises `T3Error` for what cannot be met here."""
    torch.manual_seed(config.train.seed)  # a LoRA's first weights are drawn from torch's own generator
    compute = COMPUTE[config.train.precision]
    everything = config.trainable.what == "everything"
    transformer = model.load(found, torch.float32 if everything else compute)
    before_mark = mark_of(transformer)
    make_trainable(transformer, config.trainable, compute)
    transformer.train()
    situation = Situation(accelerator.device, compute, found.config["attention_head_dim"], needs_grad=True)
    backend, why = choose(config.train.backend, situation)
    if accelerator.is_main_process:
        say(f"backend {why}")
    operator = Operator(found.plan, config.model.branches, backend)
    install(transformer, operator)
    if clips.rows < config.model.text_tokens:
        shorten(transformer, logits(clips.rows, config.model.text_tokens, compute).to(accelerator.device))
    if config.train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    before = Before(before_mark, {} if everything else small_before(transformer))
    teacher = None
    if any(stage.teaches for stage in config.stages):
        teacher = Teacher(transformer, operator, shared=not everything, dtype=compute)
    if config.train.compile:
        _compile(transformer, config, found, len(clips.pools))
        if teacher is not None and teacher.untouched is None:
            _compile(teacher.copy, config, found, len(clips.pools))
    objective = Objective(transformer, operator, teacher, compute)
    optimizers = make_optimizers(objective, config.train)
    if teacher is not None:
        teacher.to(accelerator.device)
    objective, *optimizers = accelerator.prepare(objective, *optimizers)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    average = Average(parameters, config.train.ema) if config.train.ema else None
    feeder = Feeder(
        clips,
        Layout(config.train.batch, accelerator.num_processes, accelerator.process_index),
        seed=config.train.seed,
        caption_dropout=config.data.caption_dropout,
        patch=tuple(found.config["patch_size"]),
        device=accelerator.device,
        resident=stay_on(config.data.resident, clips.nbytes, accelerator.device),
    )
    return Session(
        config, found, clips, accelerator, objective, optimizers, operator, parameters, average, feeder, before
    )


def _compile(transformer: Any, config: Config, found: Found, sizes: int) -> None:
    """Compile every block. One code object serves them all, once for each way it is run."""
    compile_blocks(transformer, found.plan)
    counts = len(set(found.plan.layers)) * max(
        stage.window_levels if stage.windows_from_dense else 1 for stage in config.stages
    )
    # With gradients or without, of the inputs too; adapters on or off; merged by the mean or on the way there.
    ways = 16 * sizes * (counts + 1)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, ways)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, ways)
