"""The tables of `docs/scaling.md`: `t3.scaling`'s model beside what was measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..files import around_marks, put_between
from ..scaling import (
    EXCHANGES,
    Clip,
    Model,
    enough_bandwidth,
    forward,
    layer_bytes,
    mean_wait,
    servers_needed,
    step,
    tensor_bytes,
)
from .scaling import (
    CONFIGS,
    DECODE,
    FORWARD,
    GIB,
    KEPT,
    LINKS,
    MIDDLE,
    Measured,
    decode_seconds,
    longest_frames,
    models,
    shares,
)

BEGIN, END = "<!-- figures: python -m t3.bench scaling -->", "<!-- end of figures -->"
WHAT = "the figures"
STEPS, PRICE, RACK = 50, 2.5, 72
MOST_BUSY = 0.9  # assumed: room for peaks of the day, and for cards that are away
# Of one H100, like `scaling.DECODE`: seconds to write 81 frames.
WRITE = (18.8, "decode_nodes_4k_h100.json")


def document(measured: Measured, price: float = PRICE) -> str:
    """All tables, as Markdown."""
    here = models(measured)
    parts = [_inputs(measured, here, price)]
    for model in here:
        parts += [_moved(model, measured), _forwards(model, measured)]
    parts.append(_vaes(measured))
    parts += [_clips(model, measured, price) for model in here]
    parts += [_batch(how, rates) for how, rates in measured.batch]
    parts.append(_serving(here, measured))
    return "\n\n".join(parts)


def _table(title: str, heads: list[str], rows: Iterator[list[str]] | list[list[str]], note: str = "") -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(["", note] if note else [])])


def _inputs(measured: Measured, here: list[Model], price: float) -> str:
    rows = []
    for model in here:
        taken = model.name in measured.forward
        source = "the files given" if taken else FORWARD[model.name][1]
        rows.append([f"{model.name}: a prediction on one GPU", f"{model.forward:.2f} s m", source])
        if model.beside:
            seen = (model.name, 2) in measured.sequence
            source = (
                "two GPUs measured, less half of one and the sending" if seen else "as much a byte as the other model"
            )
            what = f"{model.name}: packing, grouping and waiting, all ranks together"
            rows.append([what, f"{model.beside:.2f} s c", source])
    for vae, (seconds, source) in DECODE.items():
        taken = (vae, 1) in measured.decode
        value = measured.decode.get((vae, 1), seconds)
        rows.append([f"decode, VAE {vae}, on one GPU", f"{value:.1f} s m", "the files given" if taken else source])
        rows.append([f"of it the middle stage, VAE {vae}", f"{100 * MIDDLE[vae]:.0f} % c", "`benchmarks/README.md`"])
    rows.append(["writing 81 frames as H.264, 16 cores", f"{WRITE[0]} s m", WRITE[1]])
    if measured.bandwidth:
        rows.append(["all-to-all, each way, of a card", f"{measured.bandwidth / 1e9:.0f} GB/s m", "the files given"])
    for name, speed in LINKS.items():
        rows.append([f"{name}, each way, of a card", f"{speed / 1e9:.0f} GB/s a", "stated by its makers"])
    rows.append(["a GPU's hour", f"{price:.2f} $ a", "assumed: put your own by `--price`"])
    rows.append(["steps, with guidance", f"{STEPS}", "the released setting"])
    cards = f" Cards of the files given: {measured.card}." if measured.card else ""
    cards += " Of what was measured, times one GPU: against one GPU in the same run." if measured.times_one else ""
    note = "m: measured. c: computed by the model of `t3/scaling.py` from what was measured. a: assumed." + cards
    return _table("What the figures rest on", ["", "value", "from"], rows, note)


def _moved(model: Model, measured: Measured) -> str:
    links = dict(LINKS)
    if measured.bandwidth:
        links = {"as measured": measured.bandwidth} | links
    rows = []
    for ranks in model.degrees[1:]:
        sent = layer_bytes(model, ranks)
        times = [f"{1000 * sent / speed:.1f} c" for speed in links.values()]
        rows.append(
            [
                f"{ranks}",
                f"{tensor_bytes(model, ranks) / 1e9:.3f} c",
                f"{sent / 1e9:.2f} c",
                f"{model.layers * sent / 1e9:.0f} c",
                *times,
                f"{1000 * model.layer / ranks:.1f} c",
                f"{enough_bandwidth(model, ranks) / 1e9:.0f} c",
            ]
        )
    heads = ["ranks", "GB a tensor", "GB a layer", "GB a prediction"]
    heads += [f"ms a layer, {name}" for name in links] + ["ms a layer, computing", "GB/s where both are equal"]
    title = (
        f"{model.name}: sent by each rank ({EXCHANGES} tensors a layer, {model.tokens:,} tokens of {model.width} "
        f"numbers, {model.heads} heads)"
    )
    return _table(title, heads, rows)


def _forwards(model: Model, measured: Measured) -> str:
    rows = []
    fast, slow = measured.bandwidth or LINKS["NVLink 4"], LINKS["PCIe 5 x16"]
    for ranks in model.degrees[1:]:
        times = [forward(model, ranks, speed) for speed in (fast, slow)]
        cells = [f"{seconds:.2f} s, {model.forward / seconds:.2f} c" for seconds in times]
        seen = measured.sequence.get((model.name, ranks))
        rows.append([f"{ranks}", *cells, _seen(measured, "sequence", model.name, ranks, seen, 2)])
    link = "all-to-all as measured" if measured.bandwidth else "NVLink 4"
    pairs = [
        f"{times:.2f} times one GPU on {ranks}"
        for (kind, name, ranks), times in measured.times_one.items()
        if (kind, name) == ("guidance", model.name)
    ]
    return _table(
        f"{model.name}: a prediction, seconds and times one GPU, tokens over ranks",
        ["ranks", link, "PCIe 5", "measured"],
        rows,
        f"Of the time with guidance over two ranks, measured: {', '.join(pairs) or 'not yet'}.",
    )


def _vaes(measured: Measured) -> str:
    rows = []
    for vae in DECODE:
        one, _ = decode_seconds(vae, 1, measured)
        for ranks in (2, 3, 4, 8, 24):
            decode, encode = shares(vae, ranks)
            frames, all_frames = longest_frames(ranks)
            computed, _ = decode_seconds(vae, ranks, replace(measured, decode={(vae, 1): one}))
            seen, seen_encode = measured.decode.get((vae, ranks)), measured.encode.get((vae, ranks))
            rows.append(
                [
                    vae,
                    f"{ranks}",
                    f"{frames} of {all_frames} c",
                    f"{decode:.4f} c",
                    f"{computed:.1f} s, {one / computed:.2f} c",
                    _seen(measured, "decode", vae, ranks, seen),
                    f"{encode:.4f} c",
                    _seen(measured, "encode", vae, ranks, seen_encode),
                ]
            )
    heads = ["VAE", "ranks", "latent frames of the longest share", "of one rank's tiles, the busiest"]
    heads += ["decode, times one GPU", "measured", "of one rank's tiles in an encode", "encode, measured"]
    return _table(
        "Decode and encode at 4K, 81 frames: what the busiest rank has to do",
        heads,
        rows,
        f"Tiles are chosen within {KEPT // GIB} GiB (assumed).",
    )


def _seen(measured: Measured, kind: str, name: str, ranks: int, seconds: float | None, digits: int = 1) -> str:
    """A cell of what was measured: seconds, and times one GPU of the same run, where that was measured with it."""
    times = measured.times_one.get((kind, name, ranks))
    return "" if seconds is None else f"{seconds:.{digits}f} s{f', {times:.2f}' if times else ''} m"


def clips(model: Model, measured: Measured) -> list[tuple[str, Clip, str]]:
    """Teams from one GPU to as many as can share a clip: how, times, and what of the decode was measured."""
    vae = CONFIGS[model.name][1]
    speed = measured.bandwidth or LINKS["NVLink 4"]
    found = []
    for gpus in (1, 2, 4, 8, 12, 24, 48):
        ways = [(2, gpus // 2)] if gpus > 1 else [(1, 1)]
        ways += [(1, gpus)] if gpus > 1 else []
        legal = [(guidance, ranks) for guidance, ranks in ways if ranks in model.degrees]
        if not legal:
            continue
        guidance, ranks = min(legal, key=lambda way: step(model, way[0], way[1], speed))
        decode, status = decode_seconds(vae, gpus, measured)
        sampling = STEPS * step(model, guidance, ranks, speed)
        how = " x ".join(f"{name} {n}" for name, n in (("guidance", guidance), ("sequence", ranks)) if n > 1)
        found.append((how or "one GPU", Clip(gpus, sampling, decode, WRITE[0]), status))
    return found


def _clips(model: Model, measured: Measured, price: float) -> str:
    rows = []
    for how, clip, status in clips(model, measured):
        rows.append(
            [
                f"{clip.gpus}",
                how,
                f"{clip.sampling:.0f} c",
                f"{clip.decode:.1f} {status}",
                f"{clip.write:.1f} m",
                f"{clip.seconds:.0f} c",
                f"{clip.gpu_seconds:.0f} c",
                f"{clip.cost(price):.2f} c",
                f"{clip.per_hour(8):.0f} c" if clip.gpus <= 8 else "",
                f"{clip.per_hour(RACK):.0f} c",
            ]
        )
    heads = ["GPUs a clip", "split", "sampling, s", "decode, s", "writing, s", "a clip, s", "GPU seconds", "$ a clip"]
    return _table(
        f"{model.name}: a 4K clip of 81 frames, {STEPS} steps with guidance",
        [*heads, "clips an hour on 8 GPUs", f"on {RACK}"],
        rows,
    )


def _batch(how: str, rates: dict[int, float]) -> str:
    one = rates.get(1)
    rows = [[f"{gpus}", f"{rate:.0f} m", f"{rate / one:.2f} m" if one else ""] for gpus, rate in sorted(rates.items())]
    title = f"1.3b: a prompt file, a clip each (`--split data=N`): {how}, 4K"
    return _table(title, ["GPUs", "clips an hour", "times one GPU"], rows)


def _serving(here: list[Model], measured: Measured) -> str:
    rows = []
    for model in here:
        for how, clip, _ in clips(model, measured):
            if clip.gpus not in (1, 8):
                continue
            for per_hour in (100, 1000, 10000):
                wait = clip.seconds / 4
                teams = servers_needed(per_hour, clip.seconds, wait, MOST_BUSY)
                load = per_hour / 3600 * clip.seconds
                rows.append(
                    [
                        model.name,
                        f"{per_hour:,}",
                        f"{clip.gpus} ({how})",
                        f"{teams * clip.gpus:,} c",
                        f"{100 * load / teams:.0f} % c",
                        f"{mean_wait(teams, load, clip.seconds):.0f} c",
                        f"{clip.seconds + mean_wait(teams, load, clip.seconds):.0f} c",
                    ]
                )
    heads = ["model", "clips asked for an hour", "GPUs a clip", "GPUs in all", "busy", "mean wait, s", "to the file, s"]
    return _table(
        "GPUs for so many clips an hour, where a request waits a quarter of a clip's time at most, on average",
        heads,
        rows,
        f"Requests come at random (Poisson), all take the same time, and no GPU is to be busy for more than "
        f"{100 * MOST_BUSY:.0f} % of its time (all assumed).",
    )


def check_into(file: Path) -> None:
    """Raise T3Error where a document cannot be read or has not both marks."""
    around_marks(file, BEGIN, END, WHAT)


def put_into(file: Path, text: str) -> None:
    """Replace what stands between the two marks of a document. Raises T3Error where they are not there."""
    put_between(file, BEGIN, END, f"{text}\n\n", WHAT)
