"""What a training run is asked for: one TOML file, read and checked as a whole before anything is loaded.

The tables and their keys are the dataclasses below. `[[stages]]` are worked off in order; each may restate any key of
`[schedule]`, which holds what they have in common.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import T3Error
from ..files import reason
from .shards import ENDS, FIRST
from .tables import build, choice, number, unknown, words

TARGETS = ("self-attention", "cross-attention", "ffn")
SMALL = ("norms", "biases", "modulation")
# What of a clip a model is given beside its caption: nothing, the first frame, the first and the last one.
NONE = "none"
CONDITIONS = (NONE, FIRST, ENDS)
LAST_SEED = 2**63  # generators take twice as many; clips and processes count on from it


@dataclass(frozen=True)
class Model:
    """`[model]`: the weights to start from and the attention to train.

    source: diffusers folder or hub id. dit, vae, text_encoder, tokenizer: single files in place of its parts.
    part: which expert of a two-expert model is trained, at its own noise levels. boundary: the noise level where the
    second takes over from the first; 0 is what the model says. t3_weights, loras: files applied before training starts.
    plan: "auto" (what the weights carry, else the released one), a preset or a JSON file. dense_layers: numbers of
    layers that keep full attention, from 0. branches: "both" is T3; one alone is for comparison.
    text_tokens: text embeddings are padded with zeros to so many, as the pipeline does when it samples.
    """

    source: str = ""
    dit: tuple[str, ...] = ()
    vae: str = ""
    text_encoder: str = ""
    tokenizer: str = ""
    part: str = choice("transformer", "transformer_2")
    boundary: float = number(0.0, at_least=0, at_most=1)
    t3_weights: str = ""
    loras: tuple[str, ...] = ()
    plan: str = "auto"
    dense_layers: tuple[int, ...] = ()
    branches: str = choice("both", "local", "strided")
    text_tokens: int = number(512, at_least=1)


@dataclass(frozen=True)
class DataSet:
    """One entry of `[[data.sets]]`: an encoded folder and the name by which a stage's `mix` calls it.

    batch: clips a step on each process where this set gives them, 0 for `[train] batch`: of stills more fit than of
    clips.
    """

    name: str
    folder: str
    batch: int = number(0, at_least=0)


@dataclass(frozen=True)
class Data:
    """`[data]`: encoded clips (`python -m t3.retrofit encode`).

    validation: folders whose clips are only measured. holdout: without such folders, so many clips of each set, the
    last ones, are kept from training. caption_dropout: part of the clips trained without caption. conditions: shares
    of the clips by what the model is given of them, out of `CONDITIONS`; empty is what the kind of model always takes.
    resident: whether all clips wait on the training device; "auto" does so where they take less than a quarter of what
    is free.
    """

    sets: tuple[DataSet, ...] = ()
    validation: tuple[str, ...] = ()
    holdout: int = number(0, at_least=0)
    caption_dropout: float = number(0.1, at_least=0, at_most=1)
    conditions: dict[str, float] = field(default_factory=dict)
    resident: str = choice("auto", "device", "host")


@dataclass(frozen=True)
class Trainable:
    """`[trainable]`: what changes. `also` are small tensors trained beside a LoRA, kept as whole differences. `frozen`:
    beginnings of the names of parameters, as in a file under the original names ("blocks.0.self_attn.q"), that stay as
    they are where everything else is trained.

    rank and alpha are the LoRA's; alpha 0 means alpha = rank (a scale of 1).
    """

    what: str = choice("everything", "lora")
    rank: int = number(64, at_least=1)
    alpha: float = number(0.0, at_least=0)
    targets: tuple[str, ...] = words(("self-attention", "cross-attention", "ffn"), *TARGETS)
    also: tuple[str, ...] = words((), *SMALL)
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Train:
    """`[train]`: how steps are taken.

    batch: clips a step on each process and for each of `accumulate` rounds. clip: largest gradient norm, 0 for none.
    ema: decay of the averaged weights, which are validated and written; 0 for none. precision: "bf16" computes in
    bfloat16 on float32 weights. device: "auto" is the first card, or the CPU.
    """

    batch: int = number(1, at_least=1)
    accumulate: int = number(1, at_least=1)
    seed: int = number(0, at_least=0, at_most=LAST_SEED)
    precision: str = choice("bf16", "fp32")
    optimizer: str = choice("adamw", "adamw-8bit", "muon")
    weight_decay: float = number(0.01, at_least=0)
    beta1: float = number(0.9, at_least=0, at_most=0.99999)
    beta2: float = number(0.99, at_least=0, at_most=0.99999)
    clip: float = number(1.0, at_least=0)
    ema: float = number(0.999, at_least=0, at_most=0.999999)
    gradient_checkpointing: bool = False
    compile: bool = False
    backend: str = "auto"
    device: str = choice("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Stage:
    """`[schedule]` and `[[stages]]`: one stretch of training, its objective and its curriculum.

    steps, max_seconds, training_seconds: where it ends, whichever comes first; 0 is no bound. max_seconds count from
    the program's start, or from the former stage's end, and include what is needed to write the result;
    training_seconds are those of the steps alone, without start, compilation, validation and writing.
    lr rises over the part `warmup` of the stage, then follows `decay` down to `final_lr` times itself.
    flow, velocity, attention: weights of the objectives (see `objectives`). inputs: what layers get where attention
    outputs are compared. queries: tokens compared in each layer. noise, shift, sigma_min, sigma_max: how noise levels
    are drawn, and shifted; of all these those from sigma_min to sigma_max. mix: share of the batches that each data set
    gives; empty means by number of clips.
    windows_from_dense, merge_from_lse: part of the stage over which window counts grow from one to the plan's, and
    over which the merge of the branches goes from their log-sum-exp to the mean; 0 is at once. window_levels: how many
    different counts are passed.
    """

    name: str = "training"
    steps: int = number(0, at_least=0)
    max_seconds: float = number(0.0, at_least=0)
    training_seconds: float = number(0.0, at_least=0)
    lr: float = number(1e-4, at_least=0)
    warmup: float = number(0.02, at_least=0, at_most=1)
    decay: str = choice("cosine", "linear", "constant")
    final_lr: float = number(0.1, at_least=0, at_most=1)
    flow: float = number(1.0, at_least=0)
    velocity: float = number(0.0, at_least=0)
    attention: float = number(0.0, at_least=0)
    inputs: str = choice("teacher", "student")
    queries: int = number(1024, at_least=1)
    shift: float = number(5.0, at_least=0.01)
    noise: str = choice("uniform", "logit-normal")
    sigma_min: float = number(0.0, at_least=0, at_most=1)
    sigma_max: float = number(1.0, at_least=0, at_most=1)
    mix: dict[str, float] = field(default_factory=dict)
    windows_from_dense: float = number(0.0, at_least=0, at_most=1)
    window_levels: int = number(8, at_least=1)
    merge_from_lse: float = number(0.0, at_least=0, at_most=1)

    @property
    def bounded(self) -> bool:
        """Whether it ends at all; a stage that does not takes no step."""
        return bool(self.steps or self.max_seconds or self.training_seconds)

    @property
    def teaches(self) -> bool:
        """Whether the model with dense attention is needed."""
        return self.velocity > 0 or self.attention > 0


@dataclass(frozen=True)
class Validation:
    """`[validation]`: loss on held-out clips, at step 0, every `every` steps and at the end; 0 is at the ends only.

    clips: at most so many, 0 for all. levels: strata of noise; draws: levels each clip is measured at; shift: of the
    levels. Noise depends on `seed` and the clip alone, so that runs can be compared in pairs.
    """

    every: int = number(0, at_least=0)
    clips: int = number(64, at_least=0)
    levels: int = number(16, at_least=1)
    draws: int = number(1, at_least=1)
    batch: int = number(0, at_least=0)
    shift: float = number(1.0, at_least=0.01)
    seed: int = number(0, at_least=0, at_most=LAST_SEED)


@dataclass(frozen=True)
class Samples:
    """`[samples]`: clips sampled with the averaged weights every `every` steps and at the end; none without prompts.

    images, last_images: for models that take them, a file for each prompt.
    """

    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    last_images: tuple[str, ...] = ()
    every: int = number(0, at_least=0)
    height: int = number(480, at_least=16)
    width: int = number(832, at_least=16)
    frames: int = number(81, at_least=1)
    steps: int = number(50, at_least=1)
    cfg: float = number(5.0, at_least=0)
    shift: float = number(5.0, at_least=0.01)
    seed: int = number(0, at_least=0, at_most=LAST_SEED)
    fps: float = number(16.0, at_least=1)


@dataclass(frozen=True)
class Output:
    """`[output]`: the folder of the run, and what is written there. checkpoint_every 0: at the end and on a stop only.

    dtype: of the weights written at the end; small tensors stay float32. keep: checkpoints that are kept.
    tensorboard, png: whether curves are written so too, beside the CSV files.
    """

    folder: str
    checkpoint_every: int = number(500, at_least=0)
    keep: int = number(2, at_least=1)
    dtype: str = choice("bfloat16", "float16", "float32")
    log_every: int = number(20, at_least=1)
    tensorboard: bool = True
    png: bool = True


@dataclass(frozen=True)
class Config:
    """A whole run. `note` is said when it starts, such as that a recipe was never run."""

    output: Output
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    trainable: Trainable = field(default_factory=Trainable)
    train: Train = field(default_factory=Train)
    stages: tuple[Stage, ...] = ()
    validation: Validation = field(default_factory=Validation)
    samples: Samples = field(default_factory=Samples)
    note: str = ""

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run, as plain data: a resumed run must have the same."""
        content = asdict(self)
        return {key: content[key] for key in ("model", "data", "trainable", "train", "stages")}

    def fingerprint(self) -> str:
        """A short hash of `identity`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def read_config(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """Read and check a TOML file. Paths in it are taken from the folder the program runs in.

    changes: `TABLE.KEY=VALUE` each, the value in TOML; stages are counted from 1: `stages.1.lr=3e-4`.
    Raises `T3Error` for a file that is missing or no TOML (with its place), and as `parse_config`.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise T3Error(f"{file} cannot be read: {reason(error)}. List the shipped ones with `recipes`.") from None
    try:
        return parse_config(text, changes)
    except T3Error as error:
        raise T3Error(f"{file}: {error}") from None


def parse_config(text: str, changes: Sequence[str] = ()) -> Config:
    """A config from TOML text. Raises `T3Error` naming the key, the value and what would be right."""
    content = _toml(text, "it")
    for change in changes:
        _change(content, change)
    tables = {name: kind for name, kind in _TABLES.items() if name in content}
    for key in content:
        if key not in (*_TABLES, "schedule", "stages", "note"):
            raise unknown(key, (*_TABLES, "schedule", "stages", "note"), "the file")
    if "output" not in content:
        raise T3Error('it lacks [output]; at least `folder = "runs/NAME"` must be there.')
    made: dict[str, Any] = {name: build(kind, content[name], f"[{name}]") for name, kind in tables.items()}
    note = content.get("note", "")
    if not isinstance(note, str):
        raise T3Error(f"note is {note!r}; expected text in quotes.")
    config = Config(stages=_stages(content), note=note, **made)
    _check(config)
    return config


def _toml(text: str, what: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise T3Error("reading TOML on Python 3.10 needs the package tomli: pip install tomli.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise T3Error(f"{what} is no TOML: {error}.") from None


def _change(content: dict[str, Any], change: str) -> None:
    """Put one `TABLE.KEY=VALUE` in its place."""
    path, equals, value = change.partition("=")
    *tables, key = path.strip().split(".")
    if not equals or not tables or not key:
        raise T3Error(f"--set {change!r} is no change; write TABLE.KEY=VALUE, such as train.seed=1.")
    place: Any = content
    for name in tables:
        if isinstance(place, list):
            if not name.isdigit() or not 1 <= int(name) <= len(place):
                raise T3Error(f"--set {change!r}: there is no stage {name!r}; they are 1 to {len(place)}.")
            place = place[int(name) - 1]
        else:
            place = place.setdefault(name, {})
    if not isinstance(place, dict):
        raise T3Error(f"--set {change!r}: stages are counted from 1: stages.1.{key}=VALUE.")
    place[key] = _toml(f"value = {value}", f"the value of --set {change!r}")["value"]


_TABLES: dict[str, Any] = {
    "model": Model,
    "data": Data,
    "trainable": Trainable,
    "train": Train,
    "validation": Validation,
    "samples": Samples,
    "output": Output,
}


def _stages(content: dict[str, Any]) -> tuple[Stage, ...]:
    shared = content.get("schedule", {})
    build(Stage, shared, "[schedule]")
    listed = content.get("stages", [{}])
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise T3Error("stages must be tables under [[stages]], at least one, or left out.")
    return tuple(build(Stage, {**shared, **entry}, f"[[stages]] {i}") for i, entry in enumerate(listed, 1))


def _check(config: Config) -> None:
    if not config.output.folder.strip():
        raise T3Error('[output] folder is empty. Name one, such as "runs/NAME".')
    names = [entry.name for entry in config.data.sets]
    if not names:
        raise T3Error('it names no data. Add a table [[data.sets]] with name = "..." and folder = "...".')
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise T3Error(f"two of [[data.sets]] are called {twice!r}. Give each a name of its own.")
    for name, share in config.data.conditions.items():
        if name not in CONDITIONS:
            raise unknown(name, CONDITIONS, "[data] conditions")
        if share < 0:
            raise T3Error(f"[data] conditions: the share of {name!r} is {share:g}, below 0. Nearest: 0.")
    if config.data.conditions and not sum(config.data.conditions.values()):
        raise T3Error("[data] conditions: the shares add up to nothing. Give at least one of them a share above 0.")
    for i, stage in enumerate(config.stages, 1):
        where = f"[[stages]] {i} ({stage.name})"
        for name in stage.mix:
            if name not in names:
                raise unknown(name, names, f"{where} mix")
        if stage.mix and sum(stage.mix.values()) <= 0:
            raise T3Error(f"{where}: the shares in mix add up to nothing. Give at least one set a share above 0.")
        if any(share < 0 for share in stage.mix.values()):
            raise T3Error(f"{where}: a share in mix is below 0. Nearest: 0.")
        if not stage.flow and not stage.teaches:
            raise T3Error(f"{where}: flow, velocity and attention are all 0, so there is nothing to learn from.")
        if stage.sigma_min >= stage.sigma_max:
            raise T3Error(f"{where}: sigma_min {stage.sigma_min} is not below sigma_max {stage.sigma_max}.")
        if not stage.bounded and len(config.stages) > 1:
            raise T3Error(f"{where} has no end: give it steps, max_seconds or training_seconds.")
    if config.train.compile and any(stage.attention for stage in config.stages):
        raise T3Error("[train] compile does not go with the attention objective, which looks into the blocks.")
    if config.trainable.also and config.trainable.what == "everything":
        raise T3Error('[trainable] also is for what = "lora"; with "everything" these are trained already.')
    if config.trainable.frozen and config.trainable.what == "lora":
        raise T3Error('[trainable] frozen is for what = "everything"; a LoRA leaves all weights as they are.')
    for name in ("images", "last_images"):
        files = getattr(config.samples, name)
        if files and len(files) != len(config.samples.prompts):
            raise T3Error(
                f"[samples] {name} has {len(files)} files for {len(config.samples.prompts)} prompts; give one for each."
            )
    if config.samples.last_images and not config.samples.images:
        raise T3Error("[samples] last_images goes with images; give the first frames too.")
    if config.validation.draws > (most := config.validation.levels):
        raise T3Error(f"[validation] draws is {config.validation.draws}, more than levels. Nearest: {most}.")
