"""Gates, bars and the paper's claims, each decided from numbers by a rule that is written beside it.

A verdict needs all of its numbers: without one of them it is "not run". Nothing here is decided by a person.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plans import PLANS
from .evidence import CONTROL, DENSE_ROW, FULL, PLAIN, UNTUNED, Evidence
from .statistics import BANDS, Curve, Estimate

NOT_RUN, NO_GAP = "not run", "no gap"
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
        return NO_GAP
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def closed(curve: Curve | None, band: str = "whole") -> str:
    """Closure in percent, and beside it the absolute excess in thousandths, each with its interval."""
    if curve is None:
        return NOT_RUN
    closure = curve.closure(band)
    return f"{f'{percent(closure)} %' if closure else NO_GAP}; excess {points(curve.excess(band), 1000, 2)} thousandths"


def points(found: Estimate | None, scale: float = 1.0, digits: int = 1) -> str:
    """A difference with its interval, times `scale`; in points, if nothing else is said."""
    if found is None:
        return NOT_RUN
    value, low, high = (f"{scale * number:+.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def decided(e: Evidence, verdict: str, *estimates: Estimate | None) -> str:
    """The verdict, if all of these are there and from all seeds; what is missing, if not."""
    if None in estimates:
        return NOT_RUN
    fewest = min(found.seeds for found in estimates if found)
    asked = len(e.study.seeds)
    return verdict if fewest >= asked else f"{UNDECIDED}: {fewest} of {asked} seeds"


def sampled(e: Evidence, verdict: str, *compared: tuple[Estimate, int] | None) -> str:
    """As `decided`, of clips sampled with several seeds of noise."""
    if None in compared:
        return NOT_RUN
    fewest = min(found[1] for found in compared if found)
    asked = e.study.adherence.seeds
    return verdict if fewest >= asked else f"{UNDECIDED}: {fewest} of {asked} seeds of noise"


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
        lost = NOT_RUN if drop is None else f"{drop[0].value:.1f} points"
        numbers = f"{lost}; {NOT_RUN if loss is None else f'{loss:.1f} %'}"
        if loss is not None and loss < GATE_LOSS:
            verdict = FAILS
        elif drop is not None and drop[0].value < GATE_DROP:
            verdict = sampled(e, FAILS, drop)
        else:
            verdict = NOT_RUN if loss is None else sampled(e, PASSES, drop)
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
        if verdict != FAILS:
            return f"Which plan is the mildest that passes is open: {plan} was not measured in full."
    return "No plan passes the gates."


def bars(e: Evidence) -> list[Verdict]:
    """What the study set out to reach."""
    few, many = e.study.first[:2]
    found = []
    for fraction, bound in ((few, 90), (many, 95)):
        verdict = _reaches(e, fraction, bound / 100, PASSES, FAILS)
        rule = f"lower end of the 95 % interval at least {bound} %"
        found.append(Verdict(f"full fine-tune at {at(fraction)}", rule, closed(e.curve(FULL, fraction)), verdict))
    found += [_band_bar(e, fraction) for fraction in (few, many)]
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
            verdict = sampled(e, PASSES if compared and compared[0].lower >= -WORSE else FAILS, compared)
            rule = f"one-sided 95 % bound of the difference to dense at least -{WORSE:g} points"
            found.append(Verdict(f"{what}, {row} at {at(fraction)}", rule, numbers, verdict))
    return found


def _reaches(e: Evidence, fraction: float, bound: float, yes: str, no: str) -> str:
    """Whether the full fine-tune's closure is at least `bound` with its whole interval."""
    curve = e.curve(FULL, fraction)
    closure = curve.closure() if curve else None
    if curve and closure is None:
        return NOT_TESTABLE
    return decided(e, yes if closure and closure.low >= bound else no, closure)


def _band_bar(e: Evidence, fraction: float) -> Verdict:
    """A band in which un-tuned windows cost nothing that could be told has nothing to close."""
    curve, bands = e.curve(FULL, fraction), [band for band in BANDS if band != "whole"]
    numbers = ", ".join(f"{band} {closed(curve, band)}" for band in bands) if curve else NOT_RUN
    verdict = NOT_RUN
    if curve is not None:
        closures = [closure for band in bands if (closure := curve.closure(band)) is not None]
        passes = PASSES if all(closure.value >= 0.8 for closure in closures) else FAILS
        verdict = decided(e, passes, *closures) if closures else NOT_TESTABLE
    return Verdict(f"noise bands at {at(fraction)}", "closure of each at least 80 %", numbers, verdict)


def loras(e: Evidence) -> list[str]:
    """Rows that train a LoRA, and nothing else before it, on the dense model by the study's plan in every layer."""
    return [
        row.name
        for row in e.study.rows.values()
        if row.plan == e.study.plan
        and row.lora
        and len(row.phases) == 1
        and not row.phases[-1].tables.get("model", {}).get("dense_layers")
    ]


def best_lora(e: Evidence, fraction: float, *, plain: bool | None = None) -> str | None:
    """The LoRA row with the highest closure at a budget: of all, of those by plain flow matching, or of the others."""
    asked = [row for row in loras(e) if plain is None or (row in PLAIN_LORAS) == plain]
    found = {row: closure.value for row in asked if (closure := e.closure(row, fraction)) is not None}
    return max(found, key=lambda row: found[row]) if found else None


def _lora_bars(e: Evidence) -> list[Verdict]:
    fraction = e.study.first[0]
    best, plain, other = (best_lora(e, fraction, plain=plain) for plain in (None, True, False))
    gap = e.ahead(FULL, best, fraction) if best else None
    near = decided(e, PASSES if gap and 100 * gap.value <= NEAR else FAILS, gap)
    rule = f"full fine-tune ahead by at most {NEAR:g} points at equal GPU seconds"
    numbers = f"{points(gap, 100)}; it closes {closed(e.curve(best, fraction))}" if best else NOT_RUN
    found = [Verdict(f"best LoRA straight from dense ({best or '-'}) at {at(fraction)}", rule, numbers, near)]
    behind = e.ahead(FULL, plain, fraction) if plain else None
    ahead = e.ahead(other, PLAIN, fraction) if other and PLAIN in e.study.rows else None
    numbers = f"{other or '-'} less {PLAIN} {points(ahead, 100)}; full less {plain or '-'} {points(behind, 100)}"
    if ahead is not None and ahead.low > 0:
        verdict = decided(e, PASSES, ahead)
    elif behind is not None and 100 * behind.value <= NEAR:
        verdict = decided(e, "plain LoRA already matches", behind)
    else:
        verdict = decided(e, FAILS, ahead, behind)
    rule = (
        "a recipe better than plain LoRA of the same rank, the interval above 0; or plain LoRA, at any rank, is within "
        f"{NEAR:g} points of full: see the sweep"
    )
    found.append(Verdict(f"best recipe for a LoRA against plain at {at(fraction)}", rule, numbers, verdict))
    return found


def claims(e: Evidence) -> list[Verdict]:
    """The paper's claims."""
    return [_breaks(e), _full_works(e), _lora_fails(e), _lora_after(e), _both_kinds(e), _quality(e), _speed(e)]


def _breaks(e: Evidence) -> Verdict:
    drop, loss = e.untuned_drop(UNTUNED), e.untuned_loss(UNTUNED)
    verdict = NOT_RUN
    if drop is not None and loss is not None:
        breaks = drop[0].value >= GATE_DROP and loss >= GATE_LOSS
        verdict = sampled(e, REPRODUCED if breaks else NOT_REPRODUCED, drop)
    lost = points(drop[0] if drop else None)
    numbers = f"{lost} points of adherence lost; loss {NOT_RUN if loss is None else f'{loss:+.1f} %'}"
    rule = f"the study's plan costs at least {GATE_DROP:g} points of adherence and {GATE_LOSS:g} % in loss"
    return Verdict("windows on weights that were not tuned to them break the model", rule, numbers, verdict)


def _full_works(e: Evidence) -> Verdict:
    fraction = e.study.first[0]
    verdict = _reaches(e, fraction, 0.9, REPRODUCED, NOT_REPRODUCED)
    rule = f"closure at {at(fraction)} of pre-training: the interval at least 90 %"
    numbers = closed(e.curve(FULL, fraction))
    return Verdict("a modest full fine-tune brings the quality back", rule, numbers, verdict)


def _lora_fails(e: Evidence) -> Verdict:
    fraction = e.largest(FULL, PLAIN) if PLAIN in e.study.rows else None
    gap = e.ahead(FULL, PLAIN, fraction) if fraction else None
    verdict = NOT_RUN
    if gap is not None:
        low, high = 100 * gap.low, 100 * gap.high
        verdict = decided(e, REPRODUCED if low > CLEAR else NOT_REPRODUCED if high < CLEAR else UNDECIDED, gap)
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
        works = better.low > 0 and 100 * gap.value <= NEAR
        verdict = decided(e, REPRODUCED if works else NOT_REPRODUCED, better, gap)
    rule = f"better than plain LoRA, the interval above 0, within {NEAR:g} points of full fine-tune, equal GPU seconds"
    numbers = f"less plain {points(better, 100)}; full less it {points(gap, 100)}, at {at(fraction)}"
    return Verdict("a LoRA after full tuning at the low size works", rule, numbers, verdict)


def _both_kinds(e: Evidence) -> Verdict:
    fraction = e.study.first[0]
    gaps = {row: e.ahead(FULL, row, fraction) if row in e.study.rows else None for row in ("local", "strided")}
    needed = all(gap.low > 0 for gap in gaps.values() if gap)
    verdict = decided(e, REPRODUCED if needed else NOT_REPRODUCED, *gaps.values())
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
    good = all(each[0].lower >= -WORSE for each in found.values() if each)
    verdict = sampled(e, REPRODUCED if good else NOT_REPRODUCED, *found.values())
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
