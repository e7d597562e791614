"""The worst test cases of a detection, as pictures with their boxes: which objects are missed, and what is taken for one, is seen there.

A picture is kept as it is. Of a volume there are three slices through one box: the first that was missed, else the surest that is wrong.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from medssl.evaluation.box_cases import WholeCase, image_boxes
from medssl.evaluation.box_summary import case_name
from medssl.evaluation.clinical_boxes import counted, worst_first
from medssl.evaluation.detection import outcomes
from medssl.evaluation.worst import PLANES

SIZE = 480
"""Pixels per axis of a picture that are kept at most; larger ones are thinned out."""


def worst_npz(result: Mapping[str, Any], whole: Callable[[str], WholeCase], count: int) -> bytes:
    """Return the worst cases as .npz, worst first.

    Arrays: `case` (names as in the results), `planes`; and for case k and each plane `<k>_<plane>_image` (A, B) or (A, B, 3), 0 to 1,
    `_spacing` (2,), and boxes in its pixels: `_real` (N, 4) with `_real_kind` (1 found, 0 missed, -1 counts neither way), `_found` (M, 4) with
    `_found_kind` (1 right, 0 wrong, -1 neither) and `_found_score`.

    Args:
        result: As `results.json` has it.
        whole: Name of a case -> how the network sees it.
        count: How many.
    """
    cases = worst_first(counted(result)["cases"])[:count]
    planes = ["picture"] if not cases or whole(case_name(cases[0])).image.ndim == 4 else list(PLANES)
    arrays: dict[str, np.ndarray] = {"case": np.array([case_name(case) for case in cases]), "planes": np.array(planes)}
    for place, case in enumerate(cases):
        parts = _slices(case, whole(case_name(case)))
        arrays.update({f"{place}_{name}": part for name, part in parts.items()})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _slices(case: Mapping[str, Any], seen: WholeCase) -> dict[str, np.ndarray]:
    """Return image and boxes of every plane of a case."""
    own = image_boxes(case)
    scale, offset = np.tile(seen.scale, 2), np.tile(seen.offset, 2)
    real_kind, found_kind = outcomes(own, case["threshold"])
    shown = found_kind > -2
    real, found = (own.boxes - offset) / scale, (own.found[shown] - offset) / scale  # in pixels of the image
    image = np.moveaxis(seen.image[0].float().cpu().numpy(), 0, -1)
    size = seen.scale * np.array(seen.spacing_mm or np.ones(len(seen.scale)))  # of a pixel of the image
    kinds = {"real_kind": real_kind, "found_kind": found_kind[shown], "found_score": own.scores[shown]}
    if image.ndim == 3:
        step = -(-max(image.shape[:2]) // SIZE)
        parts = {"image": _grey(image[::step, ::step]), "spacing": size, "real": real / step, "found": found / step, **kinds}
        return {f"picture_{name}": part for name, part in parts.items()}
    at = _through(real, real_kind, found, kinds["found_kind"], image.shape[:3])
    parts = {}
    for axis, plane in enumerate(PLANES):
        two = [k for k in range(3) if k != axis]
        columns = [*two, *(k + 3 for k in two)]
        inside = [(boxes[:, axis] <= at[axis] + 0.5) & (at[axis] + 0.5 <= boxes[:, axis + 3]) for boxes in (real, found)]
        parts |= {
            f"{plane}_image": _grey(np.take(image, at[axis], axis=axis)),
            f"{plane}_spacing": size[two],
            f"{plane}_real": real[inside[0]][:, columns],
            f"{plane}_real_kind": real_kind[inside[0]],
            f"{plane}_found": found[inside[1]][:, columns],
            f"{plane}_found_kind": kinds["found_kind"][inside[1]],
            f"{plane}_found_score": kinds["found_score"][inside[1]],
        }
    return parts


def _through(
    real: np.ndarray, real_kind: np.ndarray, found: np.ndarray, found_kind: np.ndarray, shape: tuple[int, ...]
) -> list[int]:
    """Return the voxel through which slices are cut."""
    wrong = [*real[real_kind == 0], *found[found_kind == 0], *real[real_kind == 1]]
    centre = (wrong[0][:3] + wrong[0][3:]) / 2 if wrong else np.array(shape) / 2
    return [int(np.clip(c, 0, n - 1)) for c, n in zip(centre, shape)]


def _grey(image: np.ndarray) -> np.ndarray:
    """Return an image (..., C) as float32 from 0 to 1, without its last axis where it has one channel."""
    low, high = np.percentile(image, [0.5, 99.5])
    shown: np.ndarray = np.clip((image - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    return shown if shown.shape[-1] == 3 else shown[..., 0]
