"""Times one GPU against GPUs, as `t3.scaling`'s model has it and as measured, drawn as PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from ..errors import T3Error
from ..files import atomic_path
from ..scaling import step
from .plots import HOW
from .scaling import CONFIGS, LINKS, Measured, decode_seconds, models

MOST = 8


def draw_scaling(measured: Measured, file: Path) -> None:
    """One picture each for a prediction by tokens, a step by guidance and tokens, the decode and a prompt file: lines
    are computed, points measured. Replaces the file. Raises T3Error without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise T3Error(f"--plot needs matplotlib, which is not installed: {HOW}") from None
    here = models(measured)
    speed = measured.bandwidth or LINKS["NVLink 4"]
    figure = Figure(figsize=(11, 8), layout="constrained")
    (tokens, guidance), (decode, batch) = figure.subplots(2, 2, sharex=True)
    titles = ("A prediction: tokens", "A step: guidance x tokens", "Decode: tiles", "A prompt file: a clip each")
    for axes, title in zip((tokens, guidance, decode, batch), titles, strict=True):
        axes.plot([1, MOST], [1, MOST], color="0.8", label="as many times as GPUs")
        axes.set(title=title, xlabel="GPUs", ylabel="times one GPU", xlim=(0.5, MOST + 0.5), ylim=(0, MOST + 0.5))

    def lines(axes, name, colour, computed: dict[int, float], seen: dict[int, float]) -> None:
        axes.plot(list(computed), list(computed.values()), color=colour, label=f"{name}, computed")
        axes.plot(list(seen), list(seen.values()), "o", color=colour, label=f"{name}, measured")

    for model, colour in zip(here, ("C0", "C1"), strict=True):
        few = [ranks for ranks in model.degrees if ranks <= MOST]
        one = step(model, 1, 1, speed)
        alone = {ranks: model.forward / (step(model, 1, ranks, speed) / 2) for ranks in few}
        pairs = {2 * ranks: one / step(model, 2, ranks, speed) for ranks in few if 2 * ranks <= MOST}
        seen = {n: model.forward / seconds for (name, n), seconds in measured.sequence.items() if name == model.name}
        lines(tokens, model.name, colour, alone, seen)
        seen = {n: one / seconds for (name, n), seconds in measured.guidance.items() if name == model.name}
        lines(guidance, model.name, colour, {1: 1.0, **pairs}, seen)
    for (_, vae), colour in zip(CONFIGS.values(), ("C2", "C3"), strict=True):
        first = decode_seconds(vae, 1, measured)[0]
        unseen = Measured(decode={(vae, 1): first})
        computed = {n: first / decode_seconds(vae, n, unseen)[0] for n in (1, 2, 4, 8)}
        lines(
            decode, f"Wan{vae}", colour, computed, {n: first / s for (v, n), s in measured.decode.items() if v == vae}
        )
    if 1 in measured.batch:
        rates = {gpus: rate / measured.batch[1] for gpus, rate in sorted(measured.batch.items())}
        batch.plot(list(rates), list(rates.values()), "o", color="C0", label=f"1.3b, {measured.batch_how}, measured")
    for axes in (tokens, guidance, decode, batch):
        axes.legend(fontsize="small")
    figure.suptitle(f"4K on several GPUs ({', '.join(measured.cards) or 'nothing measured'})")
    with atomic_path(file, overwrite=True) as partial:
        figure.savefig(partial, format="png", dpi=90)
