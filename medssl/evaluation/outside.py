"""Whether a test case lies outside the range of the training cases: voxel size, vendor, and distance to the nearest of them in feature space.

A network is not known to work on what it has not seen the like of. A flag says "look at this one", not "this one is wrong".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.errors import RequestError

NEIGHBOURS = 5
QUANTILE = 0.99
SMALLEST = 3
"""Training cases below which distances say nothing."""
TOLERANCE = 0.01
"""Share by which a voxel size may differ from the range: headers round."""
UNKNOWN = ("", "unknown", "other")


@dataclass(frozen=True)
class Look:
    """What is known of a case besides its label.

    Args:
        spacing_mm: Voxel size; None where it is not known.
        vendor: Of the scanner, from a closed list; None where it is not known.
        feature: (E,) of the encoder; None where there is none.
    """

    spacing_mm: tuple[float, ...] | None = None
    vendor: str | None = None
    feature: np.ndarray | None = None


@dataclass(frozen=True)
class TrainingRange:
    """What the training cases span.

    Args:
        low_mm: Smallest voxel size along each axis; empty where none is known.
        high_mm: Largest.
        vendors: Known vendors.
        features: (N, E) of the training cases, of length 1.
        limit: Distance above which a case is outside; None where there are too few training cases.
        n: Training cases.
    """

    low_mm: tuple[float, ...] = ()
    high_mm: tuple[float, ...] = ()
    vendors: tuple[str, ...] = ()
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    limit: float | None = None
    n: int = 0

    def facts(self) -> dict[str, Any]:
        """Return what a result says of it: numbers, and vendors of the closed list."""
        return {
            "n": self.n,
            "spacing_mm": [list(self.low_mm), list(self.high_mm)] if self.low_mm else None,
            "vendors": list(self.vendors),
            "knn_limit": self.limit,
            "neighbours": min(NEIGHBOURS, max(self.n - 1, 0)),
            "quantile": QUANTILE,
        }


def training_range(looks: Sequence[Look]) -> TrainingRange:
    """Return the range of training cases.

    The limit of distances is the 99th percentile over training cases of the mean cosine distance to their nearest others (leave one
    out). Of few training cases that is about the largest distance, and of n exchangeable cases one test case in n + 1 lies above it by
    chance.

    Voxel sizes are compared axis by axis; of images and volumes together they are not.

    Raises:
        RequestError: There is no training case.
    """
    if not looks:
        raise RequestError("training range: no training case; give one or more")
    sizes = [look.spacing_mm for look in looks if look.spacing_mm]
    if len({len(size) for size in sizes}) > 1:
        sizes = []
    table = np.array(sizes, dtype=np.float64)
    features = _unit([look.feature for look in looks if look.feature is not None])
    limit = None
    if len(features) >= SMALLEST:
        away = 1 - features @ features.T
        np.fill_diagonal(away, np.inf)
        limit = float(np.quantile(_nearest(away, len(features) - 1), QUANTILE))
    return TrainingRange(
        low_mm=tuple(table.min(axis=0).tolist()) if sizes else (),
        high_mm=tuple(table.max(axis=0).tolist()) if sizes else (),
        vendors=tuple(sorted({look.vendor for look in looks if look.vendor and look.vendor not in UNKNOWN})),
        features=features,
        limit=limit,
        n=len(looks),
    )


def outside(look: Look, span: TrainingRange) -> list[dict[str, str]]:
    """Return in what a case lies outside the range: `by` (spacing, vendor or knn) and `reason`, a sentence with the numbers."""
    found = []
    for axis, size in enumerate(look.spacing_mm or ()):
        if axis >= len(span.low_mm):
            break
        low, high = span.low_mm[axis], span.high_mm[axis]
        if not low * (1 - TOLERANCE) <= size <= high * (1 + TOLERANCE):
            among = f"{low:.3g} mm" if low == high else f"{low:.3g} to {high:.3g} mm"
            found.append({"by": "spacing", "reason": f"voxel size {size:.3g} mm along axis {axis + 1}, in training {among}"})
    if look.vendor and look.vendor not in UNKNOWN and span.vendors and look.vendor not in span.vendors:
        found.append({"by": "vendor", "reason": f"vendor {look.vendor}, in training {', '.join(span.vendors)}"})
    if look.feature is not None and span.limit is not None:
        away = distance(look.feature, span)
        if away > span.limit:
            found.append(
                {"by": "knn", "reason": f"distance {away:.3g} to the nearest training cases, among these up to {span.limit:.3g}"}
            )
    return found


def distance(feature: np.ndarray, span: TrainingRange) -> float:
    """Return the mean cosine distance of a feature (E,) to its nearest training cases, as many as in leave-one-out."""
    away = 1 - _unit([feature]) @ span.features.T
    return float(_nearest(away, len(span.features) - 1)[0])


def _nearest(away: np.ndarray, others: int) -> np.ndarray:
    found: np.ndarray = np.sort(away, axis=1)[:, : min(NEIGHBOURS, others)].mean(axis=1)
    return found


def _unit(features: Sequence[np.ndarray]) -> np.ndarray:
    if not features:
        return np.zeros((0, 0))
    rows = np.stack([np.asarray(row, dtype=np.float64) for row in features])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: np.ndarray = rows / np.where(norms == 0, 1.0, norms)
    return found
