"""Times one GPU against GPUs, as `t3.scaling`'s model has it and as measured, drawn as PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..errors import T3Error
from ..files import atomic_path, check_output
from ..scaling import step
from .plots import HOW
from .scaling import CONFIGS, LINKS, Measured, decode_seconds, models

MOST = 8


def check_plot(file: Path) -> None:
    """Raise T3Error without matplotlib, or where the file cannot be written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise T3Error(f"--plot needs matplotlib, which is not installed: {HOW}") from None
    check_output(file, overwrite=True)


def draw_scaling(measured: Measured, file: Path) -> None:
    """One picture each for a prediction by tokens, a step by guidance and tokens, the decode and a prompt file: lines
    are computed, points measured. Replaces the file."""
    from matplotlib.figure import Figure

    here = models(measured)
    speed = measured.bandwidth or LINKS["NVLink 4"]
    figure = Figure(figsize=(11, 8), layout="constrained")
    (tokens, guidance), (decode, batch) = figure.subplots(2, 2, sharex=True)
    titles = ("A prediction: tokens", "A step: guidance x tokens", "Decode: tiles", "A prompt file: a clip each")
    for axes, title in zip((tokens, guidance, decode, batch), titles, strict=True):
        axes.plot([1, MOST], [1, MOST], color="0.8", label="as many times as GPUs")
        axes.set(title=title, xlabel="GPUs", ylabel="times one GPU", xlim=(0.5, MOST + 0.5), ylim=(0, MOST + 0.5))

    def seen(kind: str, name: str) -> dict[int, float]:
        return {n: times for (some, one, n), times in measured.times_one.items() if (some, one) == (kind, name)}

    def lines(axes, name, colour, computed: dict[int, float], points: dict[int, float]) -> None:
        axes.plot(list(computed), list(computed.values()), color=colour, label=f"{name}, computed")
        axes.plot(list(points), list(points.values()), "o", color=colour, label=f"{name}, measured")

    for model, colour in zip(here, ("C0", "C1"), strict=True):
        few = [ranks for ranks in model.degrees if ranks <= MOST]
        one = step(model, 1, 1, speed)
        alone = {ranks: model.forward / (step(model, 1, ranks, speed) / 2) for ranks in few}
        pairs = {2 * ranks: one / step(model, 2, ranks, speed) for ranks in few if 2 * ranks <= MOST}
        lines(tokens, model.name, colour, alone, seen("sequence", model.name))
        lines(guidance, model.name, colour, {1: 1.0, **pairs}, seen("guidance", model.name))
    for (_, vae), colour in zip(CONFIGS.values(), ("C2", "C3"), strict=True):
        first = decode_seconds(vae, 1, measured)[0]
        unseen = Measured(decode={(vae, 1): first})
        computed = {n: first / decode_seconds(vae, n, unseen)[0] for n in (1, 2, 4, 8)}
        lines(decode, f"Wan{vae}", colour, computed, seen("decode", vae))
    for number, (how, rates) in enumerate(measured.batch):
        if 1 in rates:
            times = {gpus: rate / rates[1] for gpus, rate in sorted(rates.items())}
            batch.plot(list(times), list(times.values()), "o", color=f"C{number}", label=f"1.3b, {how}, measured")
    for axes in (tokens, guidance, decode, batch):
        axes.legend(fontsize="small")
    figure.suptitle(f"4K on several GPUs ({measured.card or 'nothing measured'})")
    with atomic_path(file, overwrite=True) as partial:
        figure.savefig(partial, format="png", dpi=90)
