"""Turn a TOML table into a frozen dataclass, checking every key and value: a typo is found before any work."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ..errors import T3Error

MOST_NAMED = 30  # names that a message lists
_Made = TypeVar("_Made")


def number(default: float, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """A dataclass field for a number with bounds, both legal."""
    return dataclasses.field(default=default, metadata={"at_least": at_least, "at_most": at_most})


def choice(default: str, *others: str) -> Any:
    """A dataclass field for one of several words."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


def words(default: Sequence[str], *known: str) -> Any:
    """A dataclass field for a list of words out of those known."""
    return dataclasses.field(default=tuple(default), metadata={"choices": known})


def build(cls: type[_Made], table: Any, where: str) -> _Made:
    """`cls` from a TOML table. `where` names the table in messages: "[train]".

    Raises `T3Error` naming the key, the value, and what would be right: an unknown key (with the nearest known one),
    a value of another type, out of bounds or none of the known words, or a key that is missing.
    """
    if not isinstance(table, dict):
        raise T3Error(f"{where} is {table!r}; expected a table of keys and values.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise unknown(key, fields, where)
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(table[name], hints[name], field, f"{where} {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise T3Error(f"{where} lacks the key {name!r}, which has no usual value.")
    return cls(**values)


def unknown(key: str, known: Any, where: str) -> T3Error:
    """The error for a name that is none of those known, with the nearest of them, or else the first of them."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    some = ", ".join([*itertools.islice(known, MOST_NAMED), *(["…"] if len(known) > MOST_NAMED else [])])
    hint = f"Did you mean {near[0]!r}?" if near else f"Known are {some}."
    return T3Error(f"{where} has no key {key!r}. {hint}")


def _value(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    value = _typed(value, hint, where)
    least, most = field.metadata.get("at_least"), field.metadata.get("at_most")
    if least is not None and value < least:
        raise T3Error(f"{where} is {value}; it must be at least {least}. Nearest: {least}.")
    if most is not None and value > most:
        raise T3Error(f"{where} is {value}; it can be at most {most}. Nearest: {most}.")
    choices = field.metadata.get("choices")
    if choices:
        for word in value if isinstance(value, tuple) else (value,):
            if word not in choices:
                near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.4)
                hint_text = f" Did you mean {near[0]!r}?" if near else ""
                raise T3Error(f"{where} is {word!r}; it must be one of {', '.join(map(repr, choices))}.{hint_text}")
    return value


def _typed(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list):
            raise T3Error(f"{where} is {value!r}; expected a list: [{value!r}].")
        return tuple(_typed(entry, arguments[0], f"{where}, entry {i},") for i, entry in enumerate(value, 1))
    if origin is dict:
        if not isinstance(value, dict):
            raise T3Error(f"{where} is {value!r}; expected a table of names and numbers.")
        return {key: _typed(entry, arguments[1], f"{where}.{key}") for key, entry in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**63 else math.inf
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise T3Error(f"{where} is {value}; expected a finite number.")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
        raise T3Error(f"{where} is {value!r}; expected {names[hint]}.")
    return value
