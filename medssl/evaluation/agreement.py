"""Agreement of two measurements of the same thing, for instance the volume of a structure by network and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import bootstrap_interval

Z = 1.959963984540054


@dataclass(frozen=True)
class Agreement:
    """Bland and Altman's numbers, each (value, lower, upper) with its 95 % interval by patient, in the unit of the measurement.

    Args:
        bias: Mean of measured minus reference.
        lower: Lower limit of agreement, bias - 1.96 sd.
        upper: Upper limit, bias + 1.96 sd.
        slope: Of the differences over the means: other than 0 where the error grows with the size, and the limits then hold for none.
        n: Pairs.
    """

    bias: tuple[float, float, float]
    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    slope: tuple[float, float, float]
    n: int


def bland_altman(
    reference: Sequence[float] | np.ndarray,
    measured: Sequence[float] | np.ndarray,
    groups: Sequence[str] | None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Compare two measurements of the same cases.

    Args:
        reference: (N,), for instance ml by hand.
        measured: (N,), for instance ml by the network.
        groups: Patient of each case, or None.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        RequestError: There are fewer than two pairs, or not one reference per measurement.

    Reference:
        Bland and Altman 1999, "Measuring agreement in method comparison studies", sections 2 and 3.2; intervals by bootstrap over
        patients instead of section 2.2.
    """
    rows = np.stack([np.asarray(x, dtype=np.float64).reshape(-1) for x in _same_length(reference, measured)], axis=1)

    def difference(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = x[:, 1] - x[:, 0]
        return found

    def spread(x: np.ndarray) -> float:
        return Z * float(difference(x).std(ddof=1)) if len(x) > 1 else float("nan")

    measures = {
        "bias": lambda x: float(difference(x).mean()),
        "lower": lambda x: float(difference(x).mean()) - spread(x),
        "upper": lambda x: float(difference(x).mean()) + spread(x),
        "slope": lambda x: _slope(x.mean(axis=1), difference(x)),
    }
    found = {name: bootstrap_interval(rows, groups, draws=draws, seed=seed, statistic=f) for name, f in measures.items()}
    return Agreement(**found, n=len(rows))


def _same_length(
    reference: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray
) -> tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]:
    if len(reference) != len(measured) or len(reference) < 2:
        raise RequestError(
            f"agreement: {len(reference)} references and {len(measured)} measurements; it takes pairs of the same cases, two or more"
        )
    return reference, measured


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    around = x - x.mean()
    total = float((around**2).sum())
    return float((around * y).sum()) / total if total > 0 else float("nan")
