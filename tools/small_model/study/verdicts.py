"""Gates, bars and the paper's claims, each decided from numbers by a rule that is written beside it.

A verdict needs all of its numbers: without one of them it is "not run". Nothing here is decided by a person.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plans import PLANS
from .evidence import CONTROL, DENSE_ROW, FULL, PLAIN, UNTUNED, Evidence
from .statistics import BANDS, Estimate

NOT_RUN = "not run"
PASSES, FAILS = "passes", "fails"
REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_TESTABLE = "reproduced", "not reproduced", "undecided", "not testable"
GATE_PSNR, GATE_DETECTOR, GATE_DENSE, GATE_DROP, GATE_LOSS = 30.0, 99.0, 90.0, 30.0, 25.0
NEAR, WORSE, CLEAR = 3.0, 2.0, 10.0  # points: LoRA near full tuning; adherence; what counts as a failure of LoRA
PLAIN_LORAS = ("lora-4", PLAIN, "lora-32")


@dataclass(frozen=True)
class Verdict:
    """What was asked, the rule, the numbers, and what follows."""

    what: str
    rule: str
    numbers: str
    verdict: str


def percent(found: Estimate | None) -> str:
    """A closure with its interval, in percent."""
    if found is None:
        return NOT_RUN
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def points(found: Estimate | None, scale: float = 1.0) -> str:
    """A difference in points with its interval."""
    if found is None:
        return NOT_RUN
    return f"{scale * found.value:+.1f} [{scale * found.low:+.1f}, {scale * found.high:+.1f}]"


def at(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _least(what: str, value: float | None, bound: float, unit: str) -> Verdict:
    verdict = NOT_RUN if value is None else PASSES if value >= bound else FAILS
    return Verdict(what, f"at least {bound:g} {unit}", NOT_RUN if value is None else f"{value:.1f} {unit}", verdict)


def gates(e: Evidence) -> list[Verdict]:
    """What has to hold before the study means anything."""
    dense = e.shares(DENSE_ROW, 0.0, e.study.adherence.steps)
    found = [
        _least("VAE round trip", e.vae_psnr(), GATE_PSNR, "dB"),
        _least("detector on real clips", e.detector(), GATE_DETECTOR, "%"),
        _least("adherence of the dense model", dense["all"] if dense else None, GATE_DENSE, "%"),
    ]
    for row in untuned_rows(e):
        drop, loss = e.untuned_drop(row), e.untuned_loss(row)
        numbers = (
            f"{NOT_RUN if drop is None else f'{drop.value:.1f} points'}; {NOT_RUN if loss is None else f'{loss:.1f} %'}"
        )
        verdict = NOT_RUN
        if (drop is not None and drop.value < GATE_DROP) or (loss is not None and loss < GATE_LOSS):
            verdict = FAILS
        elif drop is not None and loss is not None:
            verdict = PASSES
        plan = e.study.row(row).plan
        rule = f"loses at least {GATE_DROP:g} points of adherence and {GATE_LOSS:g} % in loss"
        found.append(
            Verdict(f"un-tuned, {plan}{' (the study)' if plan == e.study.plan else ''}", rule, numbers, verdict)
        )
    return found


def untuned_rows(e: Evidence) -> list[str]:
    """The un-tuned rows, from the mildest plan to the severest."""
    return [row.name for plan in PLANS if (row := e.study.under(UNTUNED, plan))]


def mildest(e: Evidence) -> str:
    """Which plan the gates choose."""
    verdicts = [gate.verdict for gate in gates(e) if gate.what.startswith("un-tuned")]
    plans = [e.study.row(row).plan for row in untuned_rows(e)]
    for plan, verdict in zip(plans, verdicts, strict=True):
        if verdict == PASSES:
            return f"The mildest plan that passes is {plan}."
        if verdict == NOT_RUN:
            return f"Which plan is the mildest that passes is open: {plan} was not measured in full."
    return "No plan passes the gates."


def bars(e: Evidence) -> list[Verdict]:
    """What the study set out to reach."""
    few, many = e.study.first[:2]
    found = []
    for fraction, bound in ((few, 90), (many, 95)):
        closure = e.closure(FULL, fraction)
        verdict = NOT_RUN if closure is None else PASSES if 100 * closure.low >= bound else FAILS
        rule = f"lower end of the 95 % interval at least {bound} %"
        found.append(Verdict(f"full fine-tune at {at(fraction)}", rule, percent(closure), verdict))
    for fraction in (few, many):
        closures = {band: e.closure(FULL, fraction, band) for band in BANDS if band != "whole"}
        numbers = ", ".join(f"{band} {percent(closure)}" for band, closure in closures.items())
        verdict = (
            NOT_RUN
            if None in closures.values()
            else PASSES
            if min(c.value for c in closures.values() if c) >= 0.8
            else FAILS
        )
        found.append(Verdict(f"noise bands at {at(fraction)}", "closure of each at least 80 %", numbers, verdict))
    found += _lora_bars(e)
    for word, what in (("all", "adherence"), ("agreement", "long-range agreement")):
        steps, fraction = e.study.adherence.steps, e.study.adherence.fraction
        for row in (FULL, PLAIN):
            compared = e.share_ahead((row, fraction, steps), (CONTROL, fraction, steps), word)
            numbers = (
                f"{points(compared[0])}, bound {compared[0].lower:+.1f}, {compared[1]} seeds of noise"
                if compared
                else NOT_RUN
            )
            verdict = NOT_RUN if compared is None else PASSES if compared[0].lower >= -WORSE else FAILS
            rule = f"one-sided 95 % bound of the difference to dense at least -{WORSE:g} points"
            found.append(Verdict(f"{what}, {row} at {at(fraction)}", rule, numbers, verdict))
    return found


def loras(e: Evidence) -> list[str]:
    """Rows that put a LoRA on the dense model or on what a row made of it, by the study's plan in every layer."""
    return [
        row.name
        for row in e.study.rows.values()
        if row.plan == e.study.plan
        and row.phases[-1].tables.get("trainable", {}).get("what") == "lora"
        and not row.phases[-1].tables.get("model", {}).get("dense_layers")
    ]


def best_lora(e: Evidence, fraction: float) -> str | None:
    """The LoRA row with the highest closure at a budget."""
    found = {row: closure.value for row in loras(e) if (closure := e.closure(row, fraction)) is not None}
    return max(found, key=lambda row: found[row]) if found else None


def _lora_bars(e: Evidence) -> list[Verdict]:
    fraction = e.study.first[0]
    best = best_lora(e, fraction)
    gap = e.ahead(FULL, best, fraction) if best else None
    near = NOT_RUN if gap is None else PASSES if 100 * gap.value <= NEAR else FAILS
    rule = f"full fine-tune ahead by at most {NEAR:g} points at equal GPU seconds"
    found = [Verdict(f"best LoRA ({best or '-'}) at {at(fraction)}", rule, points(gap, 100), near)]
    plain = e.ahead(FULL, PLAIN, fraction) if PLAIN in e.study.rows else None
    ahead = e.ahead(best, PLAIN, fraction) if best and best != PLAIN else None
    matches = plain is not None and 100 * plain.value <= NEAR
    numbers = f"best less plain {points(ahead, 100)}; full less plain {points(plain, 100)}"
    verdict = NOT_RUN
    if ahead is not None and ahead.low > 0:
        verdict = PASSES
    elif matches:
        verdict = "plain LoRA already matches"
    elif plain is not None and any(e.closure(row, fraction) for row in loras(e) if row not in PLAIN_LORAS):
        verdict = FAILS
    rule = (
        f"better than plain LoRA, the interval above 0; or plain LoRA is within {NEAR:g} points of full: see the sweep"
    )
    found.append(Verdict(f"best LoRA against plain at {at(fraction)}", rule, numbers, verdict))
    return found


def claims(e: Evidence) -> list[Verdict]:
    """The paper's claims."""
    return [_breaks(e), _full_works(e), _lora_fails(e), _lora_after(e), _both_kinds(e), _quality(e), _speed(e)]


def _breaks(e: Evidence) -> Verdict:
    drop, loss = e.untuned_drop(UNTUNED), e.untuned_loss(UNTUNED)
    verdict = NOT_RUN
    if drop is not None and loss is not None:
        verdict = REPRODUCED if drop.value >= GATE_DROP and loss >= GATE_LOSS else NOT_REPRODUCED
    numbers = f"{points(drop)} points of adherence lost; loss {NOT_RUN if loss is None else f'{loss:+.1f} %'}"
    rule = f"the study's plan costs at least {GATE_DROP:g} points of adherence and {GATE_LOSS:g} % in loss"
    return Verdict("windows on weights that were not tuned to them break the model", rule, numbers, verdict)


def _full_works(e: Evidence) -> Verdict:
    fraction = e.study.first[0]
    found = e.closure(FULL, fraction)
    verdict = NOT_RUN if found is None else REPRODUCED if found.low >= 0.9 else NOT_REPRODUCED
    rule = f"closure at {at(fraction)} of pre-training: the interval at least 90 %"
    return Verdict("a modest full fine-tune brings the quality back", rule, percent(found), verdict)


def _lora_fails(e: Evidence) -> Verdict:
    fraction = e.largest(FULL, PLAIN) if PLAIN in e.study.rows else None
    gap = e.ahead(FULL, PLAIN, fraction) if fraction else None
    verdict = NOT_RUN
    if gap is not None:
        low, high = 100 * gap.low, 100 * gap.high
        verdict = REPRODUCED if low > CLEAR else NOT_REPRODUCED if high < CLEAR else UNDECIDED
    where = f" at {at(fraction)}" if fraction else ""
    rule = f"full fine-tune ahead of plain LoRA by more than {CLEAR:g} points, the whole interval"
    return Verdict("a LoRA straight from dense weights fails", rule, f"{points(gap, 100)}{where}", verdict)


def _lora_after(e: Evidence) -> Verdict:
    name = "lora-11-after-low"
    fraction = e.study.first[0]
    known = name in e.study.rows and PLAIN in e.study.rows
    better, gap = (e.ahead(name, PLAIN, fraction), e.ahead(FULL, name, fraction)) if known else (None, None)
    verdict = NOT_RUN
    if better is not None and gap is not None:
        verdict = REPRODUCED if better.low > 0 and 100 * gap.value <= NEAR else NOT_REPRODUCED
    rule = f"better than plain LoRA, the interval above 0, within {NEAR:g} points of full fine-tune, equal GPU seconds"
    numbers = f"less plain {points(better, 100)}; full less it {points(gap, 100)}, at {at(fraction)}"
    return Verdict("a LoRA after full tuning at the low size works", rule, numbers, verdict)


def _both_kinds(e: Evidence) -> Verdict:
    fraction = e.study.first[0]
    gaps = {row: e.ahead(FULL, row, fraction) if row in e.study.rows else None for row in ("local", "strided")}
    verdict = NOT_RUN
    if all(gaps.values()):
        verdict = REPRODUCED if all(gap.low > 0 for gap in gaps.values() if gap) else NOT_REPRODUCED
    numbers = (
        ", ".join(f"full less {row} only {points(gap, 100)}" for row, gap in gaps.items()) + f", at {at(fraction)}"
    )
    return Verdict(
        "both kinds of windows are needed", "both differences above 0, with their intervals", numbers, verdict
    )


def _quality(e: Evidence) -> Verdict:
    steps, fraction = e.study.adherence.steps, e.study.adherence.fraction
    found = {
        word: e.share_ahead((FULL, fraction, steps), (CONTROL, fraction, steps), word) for word in ("all", "agreement")
    }
    verdict = NOT_RUN
    if all(found.values()):
        verdict = REPRODUCED if all(each[0].lower >= -WORSE for each in found.values() if each) else NOT_REPRODUCED
    numbers = ", ".join(f"{word} {points(each[0]) if each else NOT_RUN}" for word, each in found.items())
    rule = f"tuned T3 against dense, adherence and agreement: one-sided bounds at least -{WORSE:g} points"
    return Verdict("after tuning, clips are as good as with dense attention", rule, numbers, verdict)


def _speed(e: Evidence) -> Verdict:
    steps, fraction = e.study.adherence.steps, e.study.adherence.fraction
    tuned, dense = e.shares(FULL, fraction, steps), e.shares(CONTROL, fraction, steps)
    numbers = NOT_RUN
    if tuned and dense:
        numbers = f"here {dense['sampling_seconds'] / tuned['sampling_seconds']:.2f} times as fast as dense"
    rule = "a clip has 6,720 tokens here and 685,440 at 4K: `python -m t3.bench` measures the time at 4K"
    return Verdict("sampling is more than ten times as fast at 4K", rule, numbers, NOT_TESTABLE)
