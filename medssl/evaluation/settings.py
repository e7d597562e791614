"""Settings dataclasses from what a recipe or a results file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from medssl.errors import RequestError, near

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build a settings dataclass; lists become tuples.

    Args:
        kind: The dataclass.
        values: Its fields by name; what is left out keeps its default.

    Raises:
        RequestError: A key is unknown, or the class refuses a value.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    unknown = [f"{key}{near(key, known)}" for key in values if key not in known]
    if unknown:
        raise RequestError(f"fine-tuning settings: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def refuse_settings(faults: list[str]) -> None:
    """Raise when there are faults of settings, each `key: value; what is accepted`.

    Raises:
        RequestError: With all of them.
    """
    if faults:
        raise RequestError("fine-tuning settings: " + "; ".join(faults) + "; correct these and run again")
