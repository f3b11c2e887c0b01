"""`study.toml`, read and checked as a whole: the study's numbers and its rows."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from t3.errors import T3Error
from t3.plan import Layer, Plan

from ..files import read_toml
from ..plans import GRID, PLANS

FILE = Path(__file__).with_name("study.toml")
MAIN, DENSE = "main", "dense"
TABLES = ("model", "data", "trainable", "train", "schedule")  # of t3.retrofit, that a row or a phase may change


@dataclass(frozen=True)
class Phase:
    """A training run of a row: `share` of the budget, and changes of the recipe as tables of t3.retrofit."""

    share: float = 1.0
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Row:
    """One way of tuning. `plan` and `reference` (the un-tuned row it is measured against) are names.

    rates: the learning rates that are tried. measure: nothing is trained. deciding: has all fractions and seeds.
    repeated: has all seeds at the first of the bars' fractions. like: the row of which it is a variant under another
    plan.
    """

    name: str
    title: str
    plan: str
    reference: str
    rates: tuple[float, ...]
    measure: bool
    deciding: bool
    phases: tuple[Phase, ...]
    like: str = ""
    repeated: bool = False

    @property
    def one_kind(self) -> bool:
        """Whether it has local or strided windows alone, which no plan says and the sampler does not run."""
        return any("branches" in phase.tables.get("model", {}) for phase in self.phases)

    @property
    def lora(self) -> bool:
        """Whether what it trains last is a LoRA."""
        return self.phases[-1].tables.get("trainable", {}).get("what") == "lora"


@dataclass(frozen=True)
class Measure:
    """How the velocity error is measured: on which folder of `data`, at `draws` of `levels` strata of noise."""

    folder: str
    levels: int
    draws: int


@dataclass(frozen=True)
class Adherence:
    """How clips are sampled and judged, and of which rows; see `study.toml`."""

    prompts: int
    seeds: int
    size: str
    frames: int
    steps: int
    few_steps: tuple[int, ...]
    cfg: float
    batch: int
    rows: tuple[str, ...]
    fraction: float


@dataclass(frozen=True)
class Encoded:
    """A data set to encode: arguments of `tools.small_model.encode`."""

    size: str
    split: str
    clips: int
    frames: str
    batch: int


@dataclass(frozen=True)
class Study:
    """All of it. Paths are taken from the folder the program runs in."""

    root: Path
    recipe: Path
    plan: str
    pretraining_seconds: float
    fractions: tuple[float, ...]
    first: tuple[float, ...]
    seeds: tuple[int, ...]
    tune_fraction: float
    overhead_seconds: float
    validation: Measure
    tuning: Measure
    adherence: Adherence
    parts: int
    data: dict[str, Encoded]
    plans: dict[str, Plan]
    rows: dict[str, Row]
    compile: bool | None = None

    @property
    def folder(self) -> Path:
        """Where the study works and keeps its results."""
        return self.root / "study"

    @property
    def shards(self) -> Path:
        """Its data sets, by name: apart from those of the model's stages, which have other clips."""
        return self.folder / "data"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def weights(self) -> Path:
        """Weights of finished runs, by job."""
        return self.folder / "weights"

    def row(self, name: str) -> Row:
        """A row by name. Raises `T3Error` that lists the names."""
        if name not in self.rows:
            raise T3Error(f"there is no row {name!r}; rows are {', '.join(self.rows)}.")
        return self.rows[name]

    def under(self, name: str, plan: str) -> Row | None:
        """A row, or its variant under another plan."""
        found = (row for row in self.rows.values() if row.plan == plan and name in (row.name, row.like))
        return next(found, None)

    def seconds(self, fraction: float) -> float:
        """The budget in GPU seconds of the steps."""
        return fraction * self.pretraining_seconds

    @cached_property
    def dense(self) -> str | None:
        """A short hash of the dense model's file that all rows start from; None where it is not on this machine."""
        path = Path(read_toml(self.recipe)["model"]["dit"][0])
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None

    def plan_file(self, name: str) -> str:
        """What `[model] plan` says for a plan's name: a JSON file, written here if it is not there; or "dense"."""
        if name == DENSE:
            return DENSE
        file = self.folder / "plans" / f"{name}.json"
        text = self.plans[name].to_json() + "\n"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            from t3.files import atomic_path

            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file, overwrite=True) as temp:
                temp.write_text(text, encoding="utf-8")
        return str(file)


def read_study(path: Path = FILE) -> Study:
    """Read and check a study. Raises `T3Error` naming the key and what would be right."""
    content = read_toml(path)
    try:
        return _study(content)
    except KeyError as error:
        raise T3Error(f"{path} lacks {error}.") from None
    except T3Error as error:
        raise T3Error(f"{path}: {error}") from None


def _study(content: dict[str, Any]) -> Study:
    plans = {
        **PLANS,
        **{
            name: Plan(name, GRID, tuple(Layer(*entry) for entry in layers))
            for name, layers in content.get("plans", {}).items()
        },
    }
    general, data = dict(content["study"]), dict(content["data"])
    if general["plan"] not in plans:
        raise T3Error(f"[study] plan is {general['plan']!r}; plans are {', '.join(plans)}.")
    rows: dict[str, Row] = {}
    written = {entry["name"]: entry for entry in content["rows"]}
    for entry in content["rows"]:
        if "like" in entry:
            if entry["like"] not in written:
                raise T3Error(f"row {entry['name']!r}: like is {entry['like']!r}, which is no row.")
            if entry["plan"] == general["plan"]:
                continue
            entry = {**written[entry["like"]], **entry}
        row = _row(entry, general["plan"], plans, content["rates"])
        if row.name in rows:
            raise T3Error(f"two rows are called {row.name!r}. Give each a name of its own.")
        rows[row.name] = row
    for row in rows.values():
        if row.reference not in rows or not rows[row.reference].measure:
            raise T3Error(f"row {row.name!r}: reference is {row.reference!r}, which is no row with measure = true.")
    unknown = {row for row in content["adherence"]["rows"] if row not in rows}
    if unknown:
        raise T3Error(f"[adherence] rows has {sorted(unknown)[0]!r}, which is no row.")
    general |= {key: Path(general[key]) for key in ("root", "recipe")}
    return _build(
        Study,
        {
            **general,
            "parts": data.pop("parts"),
            "validation": _build(Measure, content["validation"], "[validation]"),
            "tuning": _build(Measure, content["tuning"], "[tuning]"),
            "adherence": _build(Adherence, content["adherence"], "[adherence]"),
            "data": {name: _build(Encoded, entry, f"[data] {name}") for name, entry in data.items()},
            "plans": plans,
            "rows": rows,
        },
        "[study]",
    )


def _build(kind: type, entry: dict[str, Any], where: str) -> Any:
    """A dataclass of plain data; lists become tuples. Raises `T3Error` for keys too many or too few."""
    known = {item.name: item for item in dataclasses.fields(kind)}
    if extra := sorted(set(entry) - set(known)):
        raise T3Error(f"{where} has {extra[0]!r}; known are {', '.join(known)}.")
    required = {name for name, item in known.items() if item.default is dataclasses.MISSING}
    if missing := sorted(required - set(entry)):
        raise T3Error(f"{where} lacks {missing[0]!r}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})


def _row(entry: dict[str, Any], main: str, plans: dict[str, Plan], rates: dict[str, list[float]]) -> Row:
    name = entry["name"]
    where = f"row {name!r}"
    known = (
        "name",
        "like",
        "title",
        "plan",
        "reference",
        "rates",
        "measure",
        "deciding",
        "repeated",
        "phases",
        "stages",
        *TABLES,
    )
    if extra := sorted(set(entry) - set(known)):
        raise T3Error(f"{where} has {extra[0]!r}; known are {', '.join(known)}.")
    plan = entry.get("plan", MAIN)
    plan = main if plan == MAIN else plan
    if plan != DENSE and plan not in plans:
        raise T3Error(f"{where}: plan is {plan!r}; plans are {MAIN}, {DENSE}, {', '.join(plans)}.")
    measure = entry.get("measure", False)
    if not measure and entry.get("rates") not in rates:
        raise T3Error(f"{where}: rates is {entry.get('rates')!r}; expected one of {', '.join(rates)}.")
    shared = {table: entry[table] for table in TABLES if table in entry}
    listed = entry.get("phases", [{}])
    phases = tuple(
        _phase(shared, phase, entry.get("stages", []), f"{where}, phase {i}") for i, phase in enumerate(listed, 1)
    )
    if abs(sum(phase.share for phase in phases) - 1) > 1e-6:
        raise T3Error(f"{where}: the shares of its phases add up to {sum(p.share for p in phases):g}. Nearest: 1.")
    return Row(
        name,
        entry["title"],
        plan,
        entry.get("reference", name if measure else "untuned"),
        () if measure else tuple(rates[entry["rates"]]),
        measure,
        entry.get("deciding", False),
        phases,
        entry.get("like", ""),
        entry.get("repeated", False),
    )


def _phase(shared: dict[str, Any], entry: dict[str, Any], stages: list[dict[str, Any]], where: str) -> Phase:
    if extra := sorted(set(entry) - {"share", "stages", *TABLES}):
        raise T3Error(f"{where} has {extra[0]!r}; known are share, stages, {', '.join(TABLES)}.")
    tables = {
        name: {**shared.get(name, {}), **entry.get(name, {})} for name in TABLES if name in shared or name in entry
    }
    found = entry.get("stages", stages) or [{}]
    if abs(sum(stage.get("share", 1.0) for stage in found) - 1) > 1e-6:
        raise T3Error(f"{where}: the shares of its stages do not add up to 1.")
    return Phase(entry.get("share", 1.0), tables, tuple(found))
