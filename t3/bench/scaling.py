"""`t3.bench scaling`: what was measured over GPUs, and what `t3.scaling`'s model is to compute beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cost import ModelShape
from ..errors import T3Error
from ..plan import Grid
from ..scaling import (
    Model,
    beside,
    layer_bytes,
)
from ..vae.balance import frame_shares
from ..vae.choice import best, choices, shared_choices
from ..vae.down_plan import down_choices, shared_down_choices
from ..vae.down_structure import read_down_structure
from ..vae.structure import read_structure
from ..weights import known_config
from ..weights.layout_vae import vae_layout

GIB = 2**30
SIZE = {"1.3b": (81, 2176, 3840, 16), "5b": (81, 2176, 3840, 32)}
CONFIGS = {"1.3b": ("wan2.1-t2v-1.3b", "2.1"), "5b": ("wan2.2-ti2v-5b", "2.2")}
# Each way, of one card: what the makers state.
LINKS = {"NVLink 4": 450e9, "PCIe 5 x16": 63e9, "400 Gb/s network": 50e9}
# Of one H100, from the files beside `benchmarks/README.md`: used where no file gives the same.
FORWARD = {"1.3b": (5.75, "comfyui_4k_ways_h100.json"), "5b": (3.20, "comfyui_4k_h100.json")}
DECODE = {"2.1": (15.1, "decode_4k_h100.json"), "2.2": (19.7, "decode_4k_h100.json")}
# Part of the decode on one GPU that is the middle stage: 21 frames of 75 ms of attention (1.3B), and convolutions.
MIDDLE = {"2.1": 0.13, "2.2": 0.03}
KEPT = 60 * GIB  # memory for a tile of the decode
_PIXELS = [1, 81, 2176, 3840, 3]  # of the clip that parallel_decode.py decodes


@dataclass
class Measured:
    """What the files that were given hold, by model or VAE and number of ranks: seconds, the least of all files.

    `times_one`: one GPU's seconds over theirs by kind of row, name and ranks, both of one file: other runs are of other
    cards and hours. `batch`: of each prompt file what its clips are, and clips an hour by GPUs. `card`: the kind that
    all was measured on.
    """

    forward: dict[str, float] = field(default_factory=dict)
    sequence: dict[tuple[str, int], float] = field(default_factory=dict)
    guidance: dict[tuple[str, int], float] = field(default_factory=dict)
    decode: dict[tuple[str, int], float] = field(default_factory=dict)
    encode: dict[tuple[str, int], float] = field(default_factory=dict)
    times_one: dict[tuple[str, str, int], float] = field(default_factory=dict)
    batch: list[tuple[str, dict[int, float]]] = field(default_factory=list)
    bandwidth: float | None = None
    card: str | None = None

    @classmethod
    def read(cls, files: list[Path]) -> Measured:
        """From results of benchmarks/parallel_4k.py, parallel_decode.py and parallel_batch.py, of the real sizes.

        Raises T3Error for other files, and for those of two kinds of cards, whose times have no ratio.
        """
        found = cls()
        for file in files:
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(data, dict) or "t3_bench" in data:
                    raise ValueError("it is of something else")
                rows, runs = data.get("rows", []), data.get("runs", [])
                if not rows and not runs:
                    raise ValueError("nothing in it")
                here = cls()  # of this run alone
                for row in rows:
                    if not isinstance(row, dict):
                        raise ValueError(f"{row!r} is no row")
                    here._take(row)
                if runs:
                    here._take_batch(runs, data["options"])
                machine = data.get("machine", {})
                card = machine.get("machine") or machine.get("device")
            except KeyError as error:
                raise T3Error(f"{file} is no result of one of benchmarks/parallel_*.py: no {error} in it") from None
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise T3Error(f"{file} is no result of one of benchmarks/parallel_*.py: {error}") from None
            if here == cls():
                continue
            if card and found.card not in (None, card):
                raise T3Error(f"{file} is of {card}, the files before it of {found.card}: give files of one kind.")
            found.card = found.card or card
            found._add(here)
        return found

    def _add(self, run: Measured) -> None:
        """What one run holds, with the ratios within it."""
        for name, seconds in run.forward.items():
            _keep_least(self.forward, name, seconds)
        alone = {(name, 1): seconds for name, seconds in run.forward.items()}
        pair = {key: 2 * seconds for key, seconds in alone.items()}
        for kind, ones in (("sequence", alone), ("guidance", pair), ("decode", run.decode), ("encode", run.encode)):
            kept = getattr(self, kind)
            for (name, ranks), seconds in getattr(run, kind).items():
                if seconds > kept.get((name, ranks), seconds):
                    continue
                kept[name, ranks] = seconds
                if (name, 1) in ones:
                    self.times_one[kind, name, ranks] = ones[name, 1] / seconds
                else:
                    self.times_one.pop((kind, name, ranks), None)
        self.batch += run.batch
        if run.bandwidth:
            self.bandwidth = max(self.bandwidth or 0.0, run.bandwidth)

    def _take(self, row: dict[str, Any]) -> None:
        if "seconds" not in row:
            return
        if "model" in row:
            self._take_forward(row["model"], row)
            return
        work, vae = row["case"].split()
        if vae not in DECODE:
            raise ValueError(f"{vae!r} is no VAE of {', '.join(DECODE)}")
        if row.get("pixels", _PIXELS) != _PIXELS:
            raise ValueError(f"a clip of {row['pixels']}, not {_PIXELS}")
        # One GPU's time is that of the tile which it takes by itself; the other is there to compare pixels with.
        if row.get("row") == "one rank, the same tile":
            return
        _keep_least({"decode": self.decode, "encode": self.encode}[work], (vae, row["ranks"]), row["seconds"])

    def _take_batch(self, runs: list[dict[str, Any]], options: dict[str, Any]) -> None:
        if options.get("tiny"):
            raise ValueError("a run of --tiny")
        rates = {run["gpus"]: run["clips_an_hour"] for run in runs if "clips_an_hour" in run}
        if rates:
            how = f"{options['clips']} clips of {options['frames']} frames, {options['steps']} steps"
            self.batch.append((how, rates))

    def _take_forward(self, model: str, row: dict[str, Any]) -> None:
        if model not in SIZE:
            return
        case, ranks, seconds = row["case"], row["ranks"], row["seconds"]
        tokens = Grid.from_video(*SIZE[model]).tokens
        if row.get("tokens", tokens) != tokens:
            raise ValueError(f"{model} at {row['tokens']:,} tokens, not {tokens:,}")
        if case == "alone":
            _keep_least(self.forward, model, seconds)
        elif case in ("sequence", "guidance"):
            _keep_least(getattr(self, case), (model, ranks), seconds)
        elif case in ("all-to-all", "exchange"):
            self.bandwidth = max(self.bandwidth or 0.0, row["gb_per_s"] * 1e9)


def _keep_least(kept: dict[Any, float], key: Any, seconds: float) -> None:
    kept[key] = min(seconds, kept.get(key, seconds))


def models(measured: Measured) -> list[Model]:
    """The two released models at 4K, with the times of one GPU that were measured."""
    found = []
    for name, (config, _) in CONFIGS.items():
        shape = ModelShape.from_config(known_config(config))
        frames, height, width, per_token = SIZE[name]
        grid = Grid.from_video(frames, height, width, per_token)
        pt, ph, pw = shape.patch
        latent = 4 * shape.out_channels * grid.t * pt * grid.h * ph * grid.w * pw
        seconds = measured.forward.get(name, FORWARD[name][0])
        found.append(Model(name, shape.layers, shape.dim, shape.heads, grid.tokens, seconds, latent))
    return [replace(model, beside=_beside(model, found, measured)) for model in found]


def _beside(model: Model, models: list[Model], measured: Measured) -> float:
    """What ranks spend beside computing and sending, as seen on two; where that was seen of another model only, as much
    a byte that is sent."""
    for one in (model, *models):
        seen = measured.sequence.get((one.name, 2))
        if seen is not None and measured.bandwidth:
            share = model.layers * layer_bytes(model, 2) / (one.layers * layer_bytes(one, 2))
            return share * beside(one, 2, seen, measured.bandwidth)
    return 0.0


def shares(vae: str, ranks: int) -> tuple[float, float]:
    """What the busiest rank has to do of a decode's and an encode's tiles, in times of what one rank has."""
    config = {key: value for key, value in known_config(f"wan{vae}-vae").items() if not key.startswith("_")}
    shapes = {name: tuple(param.shape) for name, param in vae_layout(config).items()}
    _, height, width, _ = SIZE["1.3b"]
    up, down = read_structure(shapes), read_down_structure(shapes)
    size = height // up.scale, width // up.scale
    found = []
    for one, many in (
        (choices(up, *size, 2), shared_choices(up, *size, 2, ranks)),
        (down_choices(down, *size, 2), shared_down_choices(down, *size, 2, ranks)),
    ):
        alone, shared = best(one, KEPT), best(many, KEPT)
        assert alone is not None and shared is not None
        found.append(shared.work / alone.work)
    return found[0], found[1]


def longest_frames(ranks: int) -> tuple[int, int]:
    """Latent frames of the longest share in the middle stage, and of all."""
    latent_frames = 1 + (SIZE["1.3b"][0] - 1) // 4
    return len(frame_shares(latent_frames, ranks)[0]), latent_frames


def decode_seconds(vae: str, ranks: int, measured: Measured) -> tuple[float, str]:
    """Seconds of the decode over so many ranks, and whether that was measured."""
    if (vae, ranks) in measured.decode:
        return measured.decode[vae, ranks], "m"
    one = measured.decode.get((vae, 1), DECODE[vae][0])
    if ranks == 1:
        return one, "m"
    frames, all_frames = longest_frames(ranks)
    tiles, _ = shares(vae, ranks)
    return one * (MIDDLE[vae] * frames / all_frames + (1 - MIDDLE[vae]) * tiles), "c"
