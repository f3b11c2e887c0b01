"""What a run will take, before it is started: memory on a card and work of a step, in words.

Memory is counted from the shapes; activations from what the blocks of the model keep for their gradients. Work is
counted in multiply-accumulates; seconds follow from a rate that is measured on this machine, and from a share of it
that is an assumption and is named as one.
"""

from __future__ import annotations

import time

from ..cost import ModelShape, attention_pairs, other_macs
from ..memory import GIB
from ..plan import Grid, Partition
from .conditioning import Conditioning
from .config import Config, Stage
from .data import Clips, drawn, stay_on
from .model import Found, check_grids
from .model import describe as describe_model

# Of the rate of a large matrix product: a guess for blocks of this kind, named in the text.
SHARE = 0.35
# Tensors of tokens x width that one block keeps for its gradient, in units of one 16-bit tensor, FFN beside: residual
# stream and its float32 copy, normed inputs, q, k, v before and after norm and rotation, groups of both branches.
_KEPT, _KEPT_FFN = 34, 4
# Bytes an optimiser keeps of each parameter that is trained. Muon takes nearly all of them.
_OPTIMISER = {"adamw": 8.0, "adamw-8bit": 2.0, "muon": 4.0}


def describe(config: Config, found: Found, clips: Clips) -> list[str]:
    """The estimate in lines for people: the model, the data, memory and time."""
    import torch

    shape = ModelShape.from_config(found.config)
    everything, trained = found.sources.parameters // found.sources.experts, trained_parameters(config, found)
    lines = [f"note: {config.note}"] if config.note else []
    lines.append(f"model      {found.name}: {everything:,} parameters, of which {trained:,} are trained")
    lines.append(f"plan       {found.plan.name}, {found.reason}")
    notes = (*describe_model(found, clips), *check_grids(found, clips), *clips.notes)
    lines += [f"           {note}" for note in notes]
    lines.append(
        f"data       {clips.count} clips, {clips.nbytes / GIB:.2f} GiB encoded; {len(clips.held_out)} held out"
    )
    for pool in clips.pools:
        at_once = f", {pool.batch} a step and process" if pool.batch else ""
        lines.append(
            f"           {pool.name}: {len(pool.clips)} of latents {' x '.join(map(str, pool.shape))}{at_once}"
        )
    batches = [
        [(pool.each(config.train.batch), _grid(pool.shape, found)) for pool in drawn(clips.pools, stage.mix)]
        for stage in config.stages
    ]
    card = torch.cuda.is_available() and config.train.device != "cpu"
    kept = clips.nbytes if stay_on(config.data.resident, clips.nbytes, torch.device("cuda" if card else "cpu")) else 0
    needs = []
    for stage, of_stage in zip(config.stages, batches, strict=True):
        largest = max(of_stage, key=lambda some: some[0] * some[1].tokens)
        parts = memory(config, stage, shape, everything, trained, largest, clips.conditioning)
        needs.append((sum(parts.values()), {**parts, "clips": float(kept)}, largest))
    lines += _memory_lines(config, *max(needs, key=lambda need: need[0])[1:])
    if card:
        free, total = torch.cuda.mem_get_info()
        lines.append(f"           this card has {free / GIB:.0f} of {total / GIB:.0f} GiB free")
    rate = matrix_rate(config)
    for stage, of_stage in zip(config.stages, batches, strict=True):
        macs = max(step_macs(config, stage, shape, found, *some) for some in of_stage)
        seconds = 2 * macs / (rate * SHARE)
        end = f"{stage.steps:,} steps" if stage.steps else "no number of steps"
        end += f" or {stage.max_seconds:g} s" if stage.max_seconds else ""
        end += f" or {stage.training_seconds:g} s of steps" if stage.training_seconds else ""
        whole = f"; {stage.steps:,} steps in {_duration(seconds * stage.steps)}" if stage.steps else ""
        lines.append(f"time       stage {stage.name}, {end}: {2 * macs / 1e12:,.3g} TFLOP a step and process at most,")
        lines.append(
            f"           {_duration(seconds)} a step{whole}, if {SHARE:.0%} of the {rate / 1e12:,.3g} TFLOP/s that a "
            "matrix product reaches here are used (an assumption, not a measurement)"
        )
    return lines


def trained_parameters(config: Config, found: Found) -> int:
    """How many numbers are trained, by building the model without memory for its weights."""
    import torch

    from ..weights.load import transformer_class
    from .trainable import make_trainable, trained

    with torch.device("meta"):
        model = transformer_class(found.config).from_config(found.config)
        make_trainable(model, config.trainable, torch.bfloat16)
    return sum(parameter.numel() for parameter in trained(model).values())


def memory(
    config: Config,
    stage: Stage,
    shape: ModelShape,
    everything: int,
    trained: int,
    clips: tuple[int, Grid],
    conditioning: Conditioning | None = None,
) -> dict[str, float]:
    """Bytes on one process's device in a stage, by what they are for, without FSDP and clips that wait there.

    clips: how many at once, and their tokens.
    """
    train, full = config.train, config.trainable.what == "everything"
    compute = 2 if train.precision == "bf16" else 4
    batch, tokens = clips[0], clips[1].tokens
    blocks = shape.layers + len(shape.control_layers)
    block = batch * tokens * (shape.dim * _KEPT + shape.ffn_dim * _KEPT_FFN) * compute
    kept = block * blocks
    # What each VACE block adds to the layer it joins waits for it.
    stream = (blocks + len(shape.control_layers)) * batch * tokens * shape.dim * compute
    if train.gradient_checkpointing:
        kept = block + stream
    parts = {
        "weights": 4.0 * everything if full else compute * (everything - trained) + 4.0 * trained,
        "gradients": 4.0 * trained,
        "optimiser": _OPTIMISER[train.optimizer] * trained,
        "average": 4.0 * trained if train.ema else 0.0,
        "activations": float(kept),
    }
    if full and train.precision == "bf16":
        parts["bfloat16 copies of weights"] = 2.0 * everything
    if stage.attention and stage.inputs == "teacher":
        parts["the dense model's layer inputs"] = float(blocks * batch * tokens * shape.dim * compute)
    if conditioning is not None and conditioning.per_token:
        # Six modulations for each token: once for the model, and in float32 in every block whose activations are kept.
        of_blocks = 1 if train.gradient_checkpointing else blocks
        parts["timesteps of each token"] = 6.0 * batch * tokens * shape.dim * (compute + 4 * of_blocks)
    if full and any(one.teaches for one in config.stages):
        parts["the dense teacher"] = float(compute * everything)
    return parts


def _memory_lines(config: Config, parts: dict[str, float], clips: tuple[int, Grid]) -> list[str]:
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    lines = [
        f"memory     about {sum(parts.values()) / GIB:.1f} GiB on each process for {clips[0]} clips of "
        f"{' x '.join(map(str, clips[1]))} tokens: {listed} GiB"
    ]
    if not config.train.gradient_checkpointing and parts["activations"] > 0.5 * sum(parts.values()):
        lines.append("           gradient_checkpointing = true would keep one block's activations instead of all")
    if parts["weights"] > 20 * GIB:
        lines.append("           FSDP (`accelerate launch` with its config) divides all but the activations")
    return lines


def step_macs(config: Config, stage: Stage, shape: ModelShape, found: Found, batch: int, grid: Grid) -> int:
    """MACs of one step of one process with `batch` clips of `grid` tokens: forward and backward, what is computed
    again, and the dense teacher's pass."""
    partitions = found.plan.partitions(grid, shape.layers)
    partitions = [*partitions, *(partitions[layer] for layer in shape.control_layers)]
    layers = len(partitions)
    products = 2 * shape.dim
    rest = other_macs(shape, grid.tokens)

    def forward(counts: list[Partition]) -> int:
        return rest + products * sum(attention_pairs(grid, partition) for partition in counts)

    # Backward is two products for each of the forward's; a frozen weight needs no gradient of its own.
    passes = 3.0 if config.trainable.what == "everything" else 2.3
    passes += 1.0 if config.train.gradient_checkpointing else 0.0
    total = passes * forward(partitions)
    dense = [Partition(1, 1, 1)] * layers
    if stage.velocity or (stage.attention and stage.inputs == "teacher"):
        total += forward(dense)
    if stage.attention:
        total += layers * products * min(stage.queries, grid.tokens) * grid.tokens
    return int(total) * batch * config.train.accumulate


def matrix_rate(config: Config) -> float:
    """FLOP/s of a large matrix product here, in the dtype of the run: measured, in a second or so."""
    import torch

    card = torch.cuda.is_available() and config.train.device != "cpu"
    device = torch.device("cuda" if card else "cpu")
    size, times = (8192, 10) if card else (1024, 2)
    dtype = torch.bfloat16 if config.train.precision == "bf16" and card else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    if card:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        a @ a
    if card:
        torch.cuda.synchronize()
    return times * 2 * size**3 / (time.perf_counter() - start)


def _grid(shape: tuple[int, ...], found: Found) -> Grid:
    return Grid(*(n // p for n, p in zip(shape[1:], found.config["patch_size"], strict=True)))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
