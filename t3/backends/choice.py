"""Which backend is taken, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..errors import T3Error
from . import table, tuning
from .registry import BACKENDS, Backend, Situation

# The fastest exact one; the fastest of all, 8-bit ones included.
AUTO, AUTO_INT8 = "auto", "auto-int8"
# Times nearer than this are equal: the order decides, so that noise does not.
MARGIN = 0.03


def auto_order(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Exact backends, fastest first as a rule: for where nothing was measured.

    cuDNN leads from Hopper on, where it is 1.6 times as fast as FlashAttention-2.
    """
    if capability is None:
        return ("sdpa",)
    flash = ("sdpa-flash", "flash-attn-2")
    newer = ("sdpa-cudnn", "flash-attn-4", "flash-attn-3", *flash)
    ranked = newer if capability >= (9, 0) else (*flash, "sdpa-cudnn")
    return (*ranked, "sdpa-efficient", "sdpa")


def choose(name: str, situation: Situation) -> tuple[Backend, str]:
    """The backend called `name`, or the fastest for `"auto"` and `"auto-int8"`, for these tensors; and why.

    `auto` goes by what was measured on this kind of card for windows as long as `situation.windows`; a card, dtype or
    length without times is timed now, for `tuning.SECONDS` at most in a process, and the times are kept. It never is
    in code that is being compiled, in a CUDA graph or with gradients: then, and without windows, `auto_order` decides.
    `auto-int8` also takes 8-bit backends, where they were measured to be faster. They are not exact.
    Raises `T3Error` for an unknown name or a backend that cannot serve these tensors.
    """
    if torch.compiler.is_compiling():
        # What is traced reads no files and no clocks.
        return _choose(name, situation, False, False)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return _choose(name, situation, True, False)
    return _remembered(name, situation)


@lru_cache(maxsize=256)
def _remembered(name: str, situation: Situation) -> tuple[Backend, str]:
    return _choose(name, situation, True, True)


def _choose(name: str, s: Situation, may_look: bool, may_tune: bool) -> tuple[Backend, str]:
    if name not in (AUTO, AUTO_INT8):
        return _asked_for(name, s)
    passed, legal = [], []
    for candidate in _candidates(name, s):
        reason = BACKENDS[candidate].refusal(s)
        if reason is None:
            legal.append(candidate)
        else:
            passed.append(f"{candidate} ({reason})")
    because = f"; passed over {'; '.join(passed)}" if passed else ""
    # Times are of forward passes. Off NVIDIA cards there is one candidate.
    if s.windows and s.capability and not s.needs_grad and may_look:
        best, words = _by_time(name, s, legal, may_tune)
        if best:
            return BACKENDS[best], words + because
        because = f"; {words}{because}"
    # The order begins with the exact ones, of which sdpa serves everything.
    return BACKENDS[legal[0]], f"{legal[0]}: the fastest exact one, as a rule, for {s}{because}"


def _candidates(name: str, s: Situation) -> tuple[str, ...]:
    exact = auto_order(s.capability)
    return exact if name == AUTO else (*exact, *(b.name for b in BACKENDS.values() if not b.exact))


def _asked_for(name: str, s: Situation) -> tuple[Backend, str]:
    backend = BACKENDS.get(name)
    if backend is None:
        raise T3Error(f"unknown attention backend {name!r}; known are {AUTO}, {AUTO_INT8}, {', '.join(BACKENDS)}.")
    if reason := backend.refusal(s):
        legal = [b.name for b in BACKENDS.values() if b.refusal(s) is None]
        raise T3Error(f"attention backend {name!r} cannot be used for {s}: {reason}. Usable here: {', '.join(legal)}.")
    return backend, f"{name}, as asked"


def _by_time(name: str, s: Situation, legal: Sequence[str], may_tune: bool) -> tuple[str | None, str]:
    """The fastest of the legal backends over all of `s.windows`, with the times; or None, and why there are none."""
    # sdpa hands on to one of the others.
    worth = [candidate for candidate in legal if candidate != "sdpa"]
    entries = {}
    for window in dict.fromkeys(s.windows):
        entry = table.find(s, window)
        if may_tune:
            entry = _measured(s, window, worth, entry)
        if entry is None:
            why = f"the {tuning.SECONDS:g} s for tuning are used up" if may_tune else "this is no time to tune"
            return None, f"windows of {window:,} tokens were not measured on this kind of card, and {why}"
        entries[window] = entry
    timed = [candidate for candidate in worth if all(candidate in entry.ms for entry in entries.values())]
    left_out = _left_out(worth, timed, list(entries.values()))
    if not timed:
        return None, "; ".join(["nothing was measured", *left_out])
    cost = {c: sum(entries[window].per_token(c, window) for window in s.windows) for c in timed}
    least = min(cost.values())
    best = next(candidate for candidate in timed if cost[candidate] <= least * (1 + MARGIN))
    times = [_times(entry, timed) for entry in entries.values()]
    words = [f"{best}: measured on this kind of card, {'; '.join(times)}"]
    if cost[best] > least:
        words.append(f"times within {MARGIN:.0%} count as equal")
    if name == AUTO_INT8:
        words.append(_eight_bits(best, timed))
    return best, "; ".join([*words, *left_out])


def _measured(s: Situation, window: int, worth: Sequence[str], known: table.Entry | None) -> table.Entry | None:
    """What is known of a window, with what could not be timed before: those times are taken now, and remembered."""
    missing = list(worth) if known is None else known.to_be_tried(worth)
    if not missing:
        return known
    found = tuning.tune(s, window if known is None else known.window, missing)
    if found is None:
        return known
    entry = found if known is None else known.joined(found)
    if entry.ms:
        table.remember(entry)
    return entry


def _times(entry: table.Entry, timed: Sequence[str]) -> str:
    ranked = sorted(timed, key=lambda candidate: entry.ms[candidate])
    times = ", ".join(f"{candidate} {entry.ms[candidate]:.3g} ms" for candidate in ranked)
    return f"{entry.windows} x {entry.window:,} tokens, {entry.heads} heads: {times} ({entry.date})"


def _eight_bits(best: str, timed: Sequence[str]) -> str:
    eight = [candidate for candidate in timed if not BACKENDS[candidate].exact]
    if not eight:
        return "no 8-bit backend was measured here, so none is taken"
    return "the 8-bit ones lose here" if BACKENDS[best].exact else f"{best} computes in 8 bits and is not exact"


def _left_out(worth: Sequence[str], timed: Sequence[str], entries: Sequence[table.Entry]) -> list[str]:
    """What could have been taken but has no times, and why."""
    words = []
    for candidate in worth:
        if candidate not in timed:
            why = next((entry.failed[candidate] for entry in entries if candidate in entry.failed), "was not timed")
            words.append(f"{candidate} is left out ({why}; python -m t3.backends --measure times it)")
    return words


def explain(situation: Situation) -> dict[str, str]:
    """For every backend, `"usable"` or the reason why it is not."""
    return {name: backend.refusal(situation) or "usable" for name, backend in BACKENDS.items()}
