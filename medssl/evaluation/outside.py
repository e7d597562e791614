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
"""Training patients below which distances say nothing."""
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
        patient: Whose case it is, to tell the cases of one patient from those of others; None counts as a patient of its own.
    """

    spacing_mm: tuple[float, ...] | None = None
    vendor: str | None = None
    feature: np.ndarray | None = None
    patient: str | None = None


@dataclass(frozen=True)
class TrainingRange:
    """What the training cases span.

    Args:
        low_mm: Smallest voxel size along each axis; empty where none is known.
        high_mm: Largest.
        vendors: Known vendors.
        features: (N, E) of the training cases, of length 1.
        limit: Distance above which a case is outside; None where there are too few training patients.
        n: Training cases.
        n_patients: Patients of these; a case of an unknown patient counts as one.
        neighbours: Training cases over which distances are a mean.
    """

    low_mm: tuple[float, ...] = ()
    high_mm: tuple[float, ...] = ()
    vendors: tuple[str, ...] = ()
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    limit: float | None = None
    n: int = 0
    n_patients: int = 0
    neighbours: int = 0

    def facts(self) -> dict[str, Any]:
        """Return what a result says of it: numbers, and vendors of the closed list."""
        return {
            "n": self.n,
            "n_patients": self.n_patients,
            "spacing_mm": [list(self.low_mm), list(self.high_mm)] if self.low_mm else None,
            "vendors": list(self.vendors),
            "knn_limit": self.limit,
            "neighbours": self.neighbours,
            "quantile": QUANTILE,
        }


def training_range(looks: Sequence[Look]) -> TrainingRange:
    """Return the range of training cases.

    The limit of distances is the 99th percentile over training cases of the mean cosine distance to the nearest cases of other patients
    (leave one patient out): a test case has none of its own patient among the training cases either. Of few training patients that is
    about the largest distance, and of n exchangeable patients one test patient in n + 1 lies above it by chance.

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
    patients = _patients([look for look in looks if look.feature is not None])
    limit, neighbours = None, 0
    if len(set(patients.tolist())) >= SMALLEST:
        own = patients[:, None] == patients[None, :]
        neighbours = min(NEIGHBOURS, int((~own).sum(axis=1).min()))  # as many for all: a patient may have most of the cases
        away = np.where(own, np.inf, 1 - features @ features.T)
        limit = float(np.quantile(_nearest(away, neighbours), QUANTILE))
    return TrainingRange(
        low_mm=tuple(table.min(axis=0).tolist()) if sizes else (),
        high_mm=tuple(table.max(axis=0).tolist()) if sizes else (),
        vendors=tuple(sorted({look.vendor for look in looks if look.vendor and look.vendor not in UNKNOWN})),
        features=features,
        limit=limit,
        n=len(looks),
        n_patients=len(set(_patients(looks).tolist())),
        neighbours=neighbours,
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
    """Return the mean cosine distance of a feature (E,) to its nearest training cases, as many as the limit was found with."""
    away = 1 - _unit([feature]) @ span.features.T
    return float(_nearest(away, span.neighbours)[0])


def _nearest(away: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = np.sort(away, axis=1)[:, :count].mean(axis=1)
    return found


def _patients(looks: Sequence[Look]) -> np.ndarray:
    """Return a number per case, the same for cases of one patient; a case of an unknown patient has a number of its own."""
    names: dict[tuple[bool, str], int] = {}
    keys = [(True, look.patient) if look.patient is not None else (False, str(place)) for place, look in enumerate(looks)]
    return np.array([names.setdefault(key, len(names)) for key in keys], dtype=np.int64)


def _unit(features: Sequence[np.ndarray]) -> np.ndarray:
    if not features:
        return np.zeros((0, 0))
    rows = np.stack([np.asarray(row, dtype=np.float64) for row in features])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: np.ndarray = rows / np.where(norms == 0, 1.0, norms)
    return found
