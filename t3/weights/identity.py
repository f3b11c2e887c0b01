"""What is known about a file of weights, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import T3Error
from .adapter_file import AdapterFile
from .catalogue import ALSO, name_of_width
from .metadata import T3Metadata


@dataclass
class Identity:
    """What a file is.

    Attributes:
        component: "dit", "vae", "text-encoder", or "unknown".
        form: "full"; for adapters "lora", "dora", "lokr", "loha", "diff", "set", or several joined by "+"; "unknown".
        dialect: who writes names this way: "original", "comfyui", "diffusers", "peft", "diffsynth", "kohya", ...
        model: a name from `t3/configs`, another that `catalogue` makes ("wan2.1-vace-14b"), "custom" (the same
            architecture in other sizes), or "unknown".
        kind: "t2v", "i2v", "flf2v", "ti2v", "vace", "fun-control", "fun-camera", or "unknown".
        config: the library's config for a full model; None for adapters and unknown files.
        matched, unused: keys of the file that are placed, and that are known and carry nothing the model needs.
        refused: keys that cannot be placed -> why.
        t3: the file's T3 metadata.
        problem: why the file cannot be used anywhere, as a sentence with the way out; None when it can.
        elsewhere: why a file that is whole and known cannot be run headless; None when it can.
        quantised: why numbers of a whole model are not read here, though ComfyUI may; None when all are.
        strange_config: whether the config.json beside a file contradicts its tensors, and so adds nothing.
        notes: things a user should know that are no reason to stop.
        names: canonical name -> key in the file, for full models.
        adapter: the pieces, for adapters.
        width: width of the token stream, for transformers and their adapters.
        naming: what modules are called ("original", "diffusers", "huggingface"); `prefix`: what stands before it.
    """

    component: str
    form: str
    dialect: str
    model: str
    kind: str = "unknown"
    config: dict[str, Any] | None = None
    matched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    t3: T3Metadata = field(default_factory=T3Metadata)
    problem: str | None = None
    elsewhere: str | None = None
    quantised: str | None = None
    strange_config: bool = False
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    adapter: AdapterFile | None = None
    width: int | None = None
    naming: str = "original"
    prefix: str = ""

    @property
    def plan(self) -> str | None:
        """JSON text of the T3 plan the weights were tuned for, or None when the file does not say."""
        return self.t3.plan.to_json() if self.t3.plan else None

    @property
    def tuned(self) -> str:
        """Whether the weights are T3-tuned: "yes" when the file carries its plan, else "cannot tell"."""
        return self.t3.tuned

    @property
    def what(self) -> str:
        """The model in words, with what else it may be."""
        what = self.model
        if self.form == "full" and self.model in ALSO:
            what += f" or a {ALSO[self.model]}"
        if self.width and self.model in ("custom", "unknown"):
            what += f", {name_of_width(self.width)}"
        return what

    @property
    def spelling(self) -> str:
        """The dialect in words: with the prefix, and with the naming where the dialect has both."""
        said = [f"prefix {self.prefix}"] if self.prefix else []
        if self.component == "dit" and self.naming not in self.dialect and self.naming != "original":
            said.append(f"{self.naming}' module names")
        return f"{self.dialect} names" + (f" ({', '.join(said)})" if said else "")

    def describe(self) -> str:
        """One line for people."""
        keys = f"{len(self.matched)} keys matched, {len(self.unused)} unused, {len(self.refused)} refused"
        parts = [f"{self.what}: {self.component}, {self.form}, {self.spelling}", keys, f"T3-tuned: {self.tuned}"]
        problem = self.problem or self.elsewhere
        return "; ".join(parts + self.notes + ([f"cannot be used: {problem}"] if problem else []))


def some(names: list[str], count: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(repr(name) for name in names[:count]) + (", ..." if len(names) > count else "")


def require(found: Identity, component: str, option: str) -> None:
    """Raise T3Error unless the file is a whole model of `component` that runs headless."""
    if found.component != "unknown" and found.component != component:
        raise T3Error(
            f"This file is a {found.component} ({found.model}), not a {component}. Give {option} another file."
        )
    if found.form not in ("full", "unknown"):
        raise T3Error(
            f"This file is an adapter ({found.form}), not a whole {component}. Give it as --lora or --t3-weights."
        )
    if found.problem or found.elsewhere:
        raise T3Error(found.problem or found.elsewhere)
