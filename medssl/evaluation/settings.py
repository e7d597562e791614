"""Settings dataclasses from what a recipe or a results file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from medssl.errors import RequestError, near

Settings = TypeVar("Settings")
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def settings_of(kind: type[Settings], values: Mapping[str, Any], *, prefix: str = "") -> Settings:
    """Build a settings dataclass; lists become tuples.

    Args:
        kind: The dataclass.
        values: Its fields by name; what is left out keeps its default.
        prefix: Put before names in messages, for instance `detector.`.

    Raises:
        RequestError: A key is unknown, a value is of another type, or the class refuses a value.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    unknown = [f"{prefix}{key}{near(key, known)}" for key in values if key not in known]
    if unknown:
        raise RequestError(f"unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    hints = get_type_hints(kind)
    refuse_settings(
        [f"{prefix}{key}: {value!r}; {accepted(hints[key])}" for key, value in values.items() if not fits(value, hints[key])]
    )
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of the type of a field; whole numbers are numbers too, true and false are not."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, (list, tuple)) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(one, inner[0]) for one in value)
    if origin is Mapping or hint is Mapping:
        return isinstance(value, Mapping)
    return isinstance(value, hint) if isinstance(hint, type) else True


def accepted(hint: Any) -> str:
    """Return the type of a field in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(accepted(one) for one in inner)
    if origin in (tuple, Sequence):
        size = f" of {len(inner)}" if origin is tuple and Ellipsis not in inner else ""
        return f"a list{size}, each {accepted(inner[0])}"
    return "keys and values" if Mapping in (origin, hint) else WORDS.get(hint, "another type")


def refuse_settings(faults: list[str]) -> None:
    """Raise when there are faults of settings, each `key: value; what is accepted`.

    Raises:
        RequestError: With all of them.
    """
    if faults:
        raise RequestError("; ".join(faults) + "; correct these and run again")
