"""The worst test cases of a segmentation, as slices: where a network fails is seen there, not in a mean."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

COUNT = 10
PLANES = ("sagittal", "coronal", "axial")
"""By the axis (X, Y, Z) that a slice lies across."""
PICTURE = "picture"
"""In the place of the planes where the cases are pictures."""
SIZE = 160  # pixels per axis that a slice keeps at most


@dataclass
class WorstCases:
    """Keeps the slices of the cases with the lowest scores that it is shown; the others are let go.

    Args:
        count: How many.
        picture: Whether the cases are pictures (H, W, 1), which have one slice.
    """

    count: int = COUNT
    picture: bool = False
    kept: list[tuple[float, str, dict[str, np.ndarray]]] = field(default_factory=list)

    def show(
        self, case: str, score: float, image: np.ndarray, label: np.ndarray, found: np.ndarray, spacing_mm: Sequence[float]
    ) -> None:
        """Show a case.

        Args:
            case: Its code.
            score: Lower is worse; NaN is left out.
            image: (X, Y, Z).
            label: (X, Y, Z) label map.
            found: (X, Y, Z) prediction.
            spacing_mm: Voxel size.
        """
        if math.isnan(score) or (len(self.kept) == self.count and score >= self.kept[-1][0]):
            return
        self.kept.append((score, case, slices(image, label, found, spacing_mm, picture=self.picture)))
        self.kept.sort(key=lambda entry: entry[0])  # stable: of equal cases the first shown stays
        del self.kept[self.count :]

    def to_npz(self, structures: Mapping[int, str]) -> bytes:
        """Return what is kept as .npz, worst first.

        Arrays: `case`, `dice`, `structures`, `values`; and for case k and each plane `<k>_<plane>_image`, `_label`, `_prediction`,
        `_spacing_mm`.
        """
        arrays: dict[str, np.ndarray] = {
            "case": np.array([case for _, case, _ in self.kept]),
            "dice": np.array([score for score, _, _ in self.kept]),
            "structures": np.array(list(structures.values())),
            "values": np.array(list(structures), dtype=np.int64),
        }
        for place, (_, _, parts) in enumerate(self.kept):
            arrays.update({f"{place}_{name}": part for name, part in parts.items()})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()


def slices(
    image: np.ndarray, label: np.ndarray, found: np.ndarray, spacing_mm: Sequence[float], *, picture: bool = False
) -> dict[str, np.ndarray]:
    """Return for each plane the slice in which label and prediction differ in most voxels, cut around what is there; a picture whole."""
    wrong = label != found
    there = np.argwhere((label > 0) | (found > 0))
    middle = there.mean(axis=0).round().astype(int) if len(there) else np.array(label.shape) // 2
    parts: dict[str, np.ndarray] = {}
    if picture:  # shown whole: what was missed may lie anywhere
        step = -(-max(label.shape) // SIZE)
        for name, array in (("image", image.astype(np.float32)), ("label", label), ("prediction", found)):
            parts[f"{PICTURE}_{name}"] = np.ascontiguousarray(array[::step, ::step, 0])
        parts[f"{PICTURE}_spacing_mm"] = np.array([float(spacing_mm[k]) * step for k in (0, 1)])
        return parts
    for axis, plane in enumerate(PLANES):
        others = tuple(k for k in range(3) if k != axis)
        counts = wrong.sum(axis=others)
        place = int(counts.argmax()) if counts.any() else int(middle[axis])
        window = tuple(_window(label.shape[k], int(middle[k])) for k in others)
        for name, array in (("image", image), ("label", label), ("prediction", found)):
            parts[f"{plane}_{name}"] = np.ascontiguousarray(np.take(array, place, axis=axis)[window])
        parts[f"{plane}_image"] = parts[f"{plane}_image"].astype(np.float32)
        parts[f"{plane}_spacing_mm"] = np.array([float(spacing_mm[k]) for k in others])
    return parts


def _window(length: int, middle: int) -> slice:
    start = int(np.clip(middle - SIZE // 2, 0, max(0, length - SIZE)))
    return slice(start, start + SIZE)
