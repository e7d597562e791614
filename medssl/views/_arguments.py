"""Checks of what a user gives to a view. Every message names the argument, what is accepted and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.errors import RequestError, near
from medssl.views.intensity import NORMALIZATIONS

Triple = tuple[float, float, float]


def number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> float:
    """Return a checked number."""
    accepted = "a whole number" if whole else "a number"
    accepted += f" >= {low}" if low is not None else f" > {above}" if above is not None else ""
    accepted += f" and <= {high}" if high is not None else ""
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    good = good and math.isfinite(value) and not (whole and value != int(value))
    good = good and (low is None or value >= low) and (high is None or value <= high)
    good = good and (above is None or value > above)
    if not good:
        raise RequestError(f"{name}: found {value!r}; accepted is {accepted}; change {name} of the view")
    return float(value)


def triple(name: str, value: Any, **limits: Any) -> Triple:
    """Return three checked numbers, one per axis; a single number serves all axes."""
    values = list(value) if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) else [value] * 3
    if len(values) != 3:
        raise RequestError(f"{name}: found {value!r}; accepted is one number, or three (X, Y, Z); change {name} of the view")
    x, y, z = (number(name, item, **limits) for item in values)
    return x, y, z


def two(name: str, value: Any) -> list[Any]:
    """Return two values; a single one serves both axes."""
    values = list(value) if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str) else [value] * 2
    if len(values) != 2:
        raise RequestError(f"{name}: found {value!r}; accepted is one number, or two (rows, columns); change {name} of the view")
    return values


def pair(name: str, value: Any, **limits: Any) -> tuple[int, int]:
    """Return two checked whole numbers, rows and columns."""
    rows, columns = (int(number(name, item, **limits)) for item in two(name, value))
    return rows, columns


def one_of(name: str, value: Any, accepted: Sequence[str]) -> str:
    """Return a checked word."""
    if value not in accepted:
        raise RequestError(f"{name}: found {value!r}; accepted is {' or '.join(accepted)}; change {name} of the view")
    return str(value)


def share_range(name: str, value: Any) -> tuple[float, float]:
    """Return a checked range (lo, hi) of shares, 0 < lo <= hi <= 1."""
    low, high = positive_range(name, value)
    if high > 1:
        raise RequestError(f"{name}: found {value!r}; accepted is [lo, hi] with 0 < lo <= hi <= 1; change {name} of the view")
    return low, high


def positive_range(name: str, value: Any) -> tuple[float, float]:
    """Return a checked range (lo, hi) of positive factors."""
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if good:
        low, high = (number(name, item, above=0) for item in value)
        if low <= high:
            return low, high
    raise RequestError(f"{name}: found {value!r}; accepted is [lo, hi] with 0 < lo <= hi; change {name} of the view")


def field_options(name: str, value: Mapping[str, float] | None, defaults: Mapping[str, float]) -> dict[str, float] | None:
    """Return the options of a random field with defaults filled in; None when it is off."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"{name}: found {value!r}; accepted is a mapping with {', '.join(defaults)}, or null; change {name}")
    known_keys(name, value, defaults)
    options = {**defaults, **value}
    options["amplitude"] = number(f"{name}.amplitude", options["amplitude"], low=0)
    options["exponent"] = number(f"{name}.exponent", options["exponent"], above=0)
    options["probability"] = number(f"{name}.probability", options["probability"], low=0, high=1)
    return options if options["amplitude"] > 0 and options["probability"] > 0 else None


def known_keys(name: str, value: Mapping[str, Any], known: Mapping[str, Any] | Sequence[str]) -> None:
    for key in value:
        if key not in known:
            raise RequestError(
                f"{name}.{key}: unknown key{near(str(key), known)}; accepted are {', '.join(known)}; remove or rename it"
            )


def normalize_mode(value: Any) -> tuple[str, tuple[float, float] | None]:
    """Return the name of the normalisation and its window."""
    if isinstance(value, str) and value in NORMALIZATIONS and value != "window":
        return value, None
    if isinstance(value, Mapping) and list(value) == ["window"]:
        window = value["window"]
        if isinstance(window, Sequence) and not isinstance(window, str) and len(window) == 2:
            low, high = (number("normalize.window", item) for item in window)
            if low < high:
                return "window", (low, high)
    raise RequestError(
        f"normalize: found {value!r}; accepted is zscore, percentile, none or {{window: [lo, hi]}} with lo < hi; "
        "change normalize of the view"
    )


def mask_options(value: Any, size: tuple[int, int, int]) -> tuple[float, tuple[int, int, int] | None]:
    """Return hidden share and grid of a mask; the grid is None without a mask."""
    if value is None:
        return 0.0, None
    if not isinstance(value, Mapping) or "ratio" not in value or "cell" not in value:
        raise RequestError(f"mask: found {value!r}; accepted is {{ratio: 0.75, cell: 16}}, or null; change mask of the view")
    known_keys("mask", value, ("ratio", "cell"))
    ratio = number("mask.ratio", value["ratio"], low=0, high=1)
    if ratio == 1:
        raise RequestError("mask.ratio: found 1, which hides everything; accepted is 0 <= ratio < 1; lower it")
    cell = triple("mask.cell", value["cell"], whole=True, low=1)
    if any(n % c for n, c in zip(size, cell)):
        raise RequestError(
            f"mask.cell: {[int(c) for c in cell]} does not divide the size {list(size)}; accepted are divisors of the "
            "size along each axis; change mask.cell or size"
        )
    x, y, z = (n // int(c) for n, c in zip(size, cell))
    return ratio, (x, y, z)


def point_options(value: Any, *, warped: bool) -> dict[str, int] | None:
    """Return how many seed points and random negatives are drawn, None for none."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(
            f"points: found {value!r}; accepted is {{seeds: 100, negatives: 1000}}, or null; change points of the view"
        )
    known_keys("points", value, ("seeds", "negatives"))
    if warped:
        raise RequestError("points: a warped view has no linear map to millimetres; accepted are views without warp; remove warp")
    return {
        "seeds": int(number("points.seeds", value.get("seeds", 100), whole=True, low=1)),
        "negatives": int(number("points.negatives", value.get("negatives", 1000), whole=True, low=0)),
    }
