"""Scores of found boxes: average precision over overlaps, and FROC; images and volumes, with intervals by patient.

**Matching.** Within an image and a class, found boxes are taken from the best score down. Each takes the free real box that it overlaps most,
if that is at least the threshold, and is right; else it is wrong. A found box that only meets a box marked `ignore` (difficult, uncertain)
is neither, and a missed one of these is not missed. Of an ignored object overlap is intersection over union; of a region (a crowd, uncertain
voxels) it is the share of the found box that lies in it, since any number of objects may be there.

**Ties.** Found boxes of equal score are taken together: no order among them changes precision or recall. **Empty images** have no real box,
and everything found there is wrong. A class without a real box has no score, and is left out of means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic, bootstrap_interval

OVERLAPS = tuple(round(0.1 + 0.05 * k, 2) for k in range(9))
"""0.1 to 0.5 in steps of 0.05: a box that is roughly right helps in medicine, and thin objects never reach 0.75."""
RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per image at which FROC is read (LUNA16)."""
FROC_OVERLAP = 0.1
"""Overlap from which a box counts as found in FROC: something is looked for, and where it is matters more than how large."""
OPERATING_RATE = 1.0
"""False positives per image that the threshold of a single answer allows on the cases it is fitted on."""
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ImageBoxes:
    """What is in an image, and what was found there. Boxes are (N, 2 D): low corner, then high corner.

    Args:
        boxes: Real boxes.
        labels: (N,) their classes, from 0.
        ignore: (N,) bool, boxes that count neither way.
        found: (M, 2 D) found boxes.
        found_labels: (M,).
        scores: (M,) higher is surer.
        region: (N,) bool, those of `ignore` that are regions, not single objects; None for none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    found: np.ndarray
    found_labels: np.ndarray
    scores: np.ndarray
    region: np.ndarray | None = None

    @property
    def regions(self) -> np.ndarray:
        """(N,) bool, `region` or all False."""
        return np.zeros(len(self.boxes), dtype=bool) if self.region is None else self.region


@dataclass(frozen=True)
class Matches:
    """All found boxes of a class over some images, best first.

    Args:
        scores: (M,) falling.
        image: (M,) place of the image.
        right: (T, M) per overlap threshold: 1 right, 0 wrong, -1 neither.
        real: (I,) boxes to be found in every image.
        overlaps: (T,) thresholds.
    """

    scores: np.ndarray
    image: np.ndarray
    right: np.ndarray
    real: np.ndarray
    overlaps: tuple[float, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        """(G,) place of the last box of every distinct score."""
        return np.flatnonzero(np.append(self.scores[1:] < self.scores[:-1], True)) if len(self.scores) else np.zeros(0, int)

    @cached_property
    def steps(self) -> list[tuple[np.ndarray, ...]]:
        """Per threshold: places of right boxes and of those that are neither; the ends at which recall rises, and how many of both lie above.

        A bootstrap asks for them a thousand times, and only how often an image counts differs.
        """
        found: list[tuple[np.ndarray, ...]] = []
        for row in self.right:
            right, neither = np.flatnonzero(row == 1), np.flatnonzero(row == -1)
            ends = np.unique(self.ends[np.searchsorted(self.ends, right)])
            found.append((right, neither, ends, np.searchsorted(right, ends, "right"), np.searchsorted(neither, ends, "right")))
        return found


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the overlap (intersection over union) of boxes (N, 2 D) and (M, 2 D): (N, M), 0 where both are empty."""
    shared, size_a, size_b = _shared(a, b)
    union = size_a[:, None] + size_b[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)  # type: ignore[no-any-return]


def box_cover(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the share of boxes (N, 2 D) that lies in boxes (M, 2 D): (N, M), 0 where the first is empty."""
    shared, size_a, _ = _shared(a, b)
    whole = np.broadcast_to(size_a[:, None], shared.shape)
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)  # type: ignore[no-any-return]


def _shared(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the intersections (N, M) of boxes, and the sizes of both."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    dims = a.shape[1] // 2
    low = np.maximum(a[:, None, :dims], b[None, :, :dims])
    high = np.minimum(a[:, None, dims:], b[None, :, dims:])
    size_a, size_b = ((x[:, dims:] - x[:, :dims]).prod(axis=1) for x in (a, b))
    return np.clip(high - low, 0, None).prod(axis=2), size_a, size_b


def match_image(image: ImageBoxes, label: int, overlaps: Sequence[float]) -> tuple[np.ndarray, np.ndarray, int]:
    """Match what was found of one class in one image.

    Args:
        image: See there.
        label: The class.
        overlaps: T thresholds.

    Returns:
        Scores (M,) falling, outcomes (T, M) as in `Matches`, and the number of boxes to be found.
    """
    mine, real, with_real, with_hidden = _candidates(image, label)
    right = [_taken(with_real, with_hidden, threshold)[0] for threshold in overlaps]
    return image.scores[mine].astype(np.float64), np.array(right, dtype=np.int8).reshape(len(overlaps), len(mine)), len(real)


def _candidates(image: ImageBoxes, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return places of found boxes of a class, best first, and of real ones, and how much the found overlap these and hidden ones."""
    real, hidden = (np.flatnonzero((image.labels == label) & flag) for flag in (~image.ignore, image.ignore))
    mine = np.flatnonzero(image.found_labels == label)
    mine = mine[np.argsort(-image.scores[mine], kind="stable")]
    found = image.found[mine].reshape(-1, image.boxes.shape[1])
    with_hidden = np.where(image.regions[hidden], box_cover(found, image.boxes[hidden]), box_iou(found, image.boxes[hidden]))
    return mine, real, box_iou(found, image.boxes[real]), with_hidden


def _taken(with_real: np.ndarray, with_hidden: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return outcomes (M,) as in `Matches`, and (R,) whether each real box was taken."""
    right, free = np.zeros(len(with_real), dtype=np.int8), np.ones(with_real.shape[1], dtype=bool)
    for k in range(len(with_real)):
        values = np.where(free, with_real[k], -1.0)
        if len(values) and values.max() >= threshold:
            free[int(values.argmax())] = False
            right[k] = 1
        elif with_hidden.shape[1] and with_hidden[k].max() >= threshold:
            right[k] = -1
    return right, ~free


def match(images: Sequence[ImageBoxes], label: int, overlaps: Sequence[float] = OVERLAPS) -> Matches:
    """Match what was found of one class in some images."""
    parts = [match_image(image, label, overlaps) for image in images]
    scores = np.concatenate([scores for scores, _, _ in parts]) if parts else np.zeros(0)
    right = np.concatenate([right for _, right, _ in parts], axis=1) if parts else np.zeros((len(overlaps), 0), dtype=np.int8)
    places = np.repeat(np.arange(len(parts)), [len(scores) for scores, _, _ in parts])
    order = np.argsort(-scores, kind="stable")
    real = np.array([n for _, _, n in parts], dtype=np.int64)
    return Matches(scores[order], places[order], right[:, order], real, tuple(float(t) for t in overlaps))


def together(matches: Sequence[Matches]) -> Matches:
    """Return the matches of several classes as those of one: what FROC over all classes is read from."""
    scores = np.concatenate([m.scores for m in matches])
    order = np.argsort(-scores, kind="stable")
    image = np.concatenate([m.image for m in matches])[order]
    right = np.concatenate([m.right for m in matches], axis=1)[:, order]
    return Matches(scores[order], image, right, np.sum([m.real for m in matches], axis=0), matches[0].overlaps)


def _counts(matches: Matches, times: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Return right and wrong boxes (T, G) down to every distinct score, and boxes to be found, images counted `times`."""
    weights = np.ones(len(matches.real)) if times is None else np.asarray(times, dtype=np.float64)
    each = weights[matches.image]
    right = np.cumsum((matches.right == 1) * each, axis=1)[:, matches.ends]
    wrong = np.cumsum((matches.right == 0) * each, axis=1)[:, matches.ends]
    return right, wrong, float((weights * matches.real).sum())


def average_precision(matches: Matches, times: np.ndarray | None = None) -> np.ndarray:
    """Return the mean precision at 101 recalls per overlap threshold, (T,); NaN where there is nothing to be found.

    The precision at a recall is the highest at this or any higher one; 0 where the recall is not reached.

    Args:
        matches: Of one class.
        times: (I,) how often each image counts, as a bootstrap draw has it; None counts each once.

    Reference:
        Lin et al. 2014, "Microsoft COCO", and its evaluation code; Everingham et al. 2010 for the interpolation.
    """
    weights = np.ones(len(matches.real)) if times is None else np.asarray(times, dtype=np.float64)
    real = float((weights * matches.real).sum())
    if real == 0:
        return np.full(len(matches.overlaps), np.nan)
    each = weights[matches.image]
    seen = np.cumsum(each)
    found = np.zeros(len(matches.overlaps))
    for row, (at, neither, ends, n_right, n_neither) in enumerate(
        matches.steps
    ):  # precision is highest where a right box was added
        right = np.cumsum(each[at])[n_right - 1]
        counted = seen[ends]
        if len(neither):
            counted = counted - np.append(0.0, np.cumsum(each[neither]))[n_neither]
        precision = np.divide(right, counted, out=np.zeros_like(right), where=counted > 0)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        place = np.searchsorted(right / real, RECALLS - 1e-12)
        found[row] = best[place[place < len(right)]].sum() / len(RECALLS)
    return found


def mean_average_precision(matches: Sequence[Matches], times: np.ndarray | None = None) -> float:
    """Return the mean over classes with boxes of their mean average precision over thresholds; NaN where no class has any.

    Args:
        matches: One per class.
        times: As in `average_precision`.
    """
    values = [float(average_precision(m, times).mean()) for m in matches]
    values = [v for v in values if not math.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


def froc(matches: Matches, times: np.ndarray | None = None, rates: Sequence[float] = RATES) -> np.ndarray:
    """Return the sensitivity at each rate of false positives per image, (T, R): the highest that a score threshold reaches within it.

    No interpolation: between two thresholds nothing can be had.

    Args:
        matches: Of one class, or of several (`together`).
        times: As in `average_precision`.
        rates: False positives per image.

    Reference:
        Setio et al. 2017, "Validation, comparison, and combination of algorithms for automatic detection of pulmonary nodules" (LUNA16).
    """
    right, wrong, real = _counts(matches, times)
    images = float(len(matches.real) if times is None else times.sum())
    if real == 0:
        return np.full((len(matches.overlaps), len(rates)), np.nan)
    found = np.zeros((len(right), len(rates)))
    for row in range(len(right)):
        for column, rate in enumerate(rates):
            allowed = int(np.searchsorted(wrong[row], rate * images + 1e-9, side="right"))
            found[row, column] = right[row, allowed - 1] / real if allowed else 0.0
    return found


def mean_sensitivity(matches: Matches, times: np.ndarray | None = None) -> float:
    """Return the mean of `froc` over rates and thresholds: the score of LUNA16."""
    return float(froc(matches, times).mean())


def score_threshold(matches: Matches, rate: float) -> float:
    """Return the lowest threshold with at most so many false positives per image: the point at which `froc` is read.

    No score of other cases between the last one allowed and the next lower one speaks against it, so that it lies just above the latter.

    Args:
        matches: At one overlap, see `pick`; of one class, or of several (`together`).
        rate: False positives per image.

    Returns:
        0 where every score is allowed, else the next number above the highest score that is not.
    """
    _, wrong, _ = _counts(matches, None)
    ends = matches.ends
    allowed = int(np.searchsorted(wrong[0], rate * len(matches.real) + 1e-9, side="right"))
    return 0.0 if allowed == len(ends) else float(np.nextafter(matches.scores[ends[allowed]], np.inf))


def operating_point(images: Sequence[ImageBoxes], n_classes: int) -> float:
    """Return `score_threshold` of all classes together at `OPERATING_RATE`, boxes counting as found from `FROC_OVERLAP`."""
    return score_threshold(together(match_classes(images, n_classes, (FROC_OVERLAP,))), OPERATING_RATE)


def outcomes(image: ImageBoxes, threshold: float, overlap: float = FROC_OVERLAP) -> tuple[np.ndarray, np.ndarray]:
    """Say of every box in an image what became of it at a score threshold.

    Args:
        image: See there.
        threshold: Found boxes below it are as if not found.
        overlap: From which a box counts as found.

    Returns:
        (N,) of the real boxes: 1 found, 0 missed, -1 counts neither way; (M,) of the found ones: 1 right, 0 wrong, -1 neither, -2 below.
    """
    real = np.where(image.ignore, -1, 0)
    found = np.full(len(image.scores), -2)
    for label in np.unique(np.concatenate([image.labels, image.found_labels])):
        mine, own, with_real, with_hidden = _candidates(image, int(label))
        count = int((image.scores[mine] >= threshold).sum())
        found[mine[:count]], real[own] = _taken(with_real[:count], with_hidden[:count], overlap)
    return real, found


def match_classes(images: Sequence[ImageBoxes], n_classes: int, overlaps: Sequence[float] = OVERLAPS) -> list[Matches]:
    """Match every class.

    Raises:
        RequestError: There is no image.
    """
    if not images:
        raise RequestError("detection scores: no image; score one or more")
    return [match(images, label, overlaps) for label in range(n_classes)]


def pick(matches: Matches, overlap: float) -> Matches:
    """Return the matches at one threshold alone."""
    row = matches.overlaps.index(overlap)
    return Matches(matches.scores, matches.image, matches.right[row : row + 1], matches.real, (overlap,))


def of_images(matches: Matches, there: np.ndarray) -> Matches:
    """Return the matches of some images alone, (I,) bool; the others keep their places and hold nothing."""
    kept = there[matches.image]
    return Matches(matches.scores[kept], matches.image[kept], matches.right[:, kept], matches.real * there, matches.overlaps)


def over_images(score: Any, n: int) -> Statistic:
    """Return a statistic for `bootstrap_interval` over rows that are places of images: `score(times)` of how often each was drawn."""
    return lambda rows: float(score(np.bincount(np.asarray(rows, dtype=np.int64), minlength=n)))


def detection_rows(
    name: str,
    images: Sequence[ImageBoxes],
    classes: Sequence[str],
    groups: Sequence[str] | None,
    *,
    draws: int = 1000,
    seed: int = 0,
    froc_overlap: float = FROC_OVERLAP,
) -> list[dict[str, Any]]:
    """Return mAP over 0.1 to 0.5, mAP at 0.5, each class's AP, and FROC, with intervals.

    Args:
        name: Of the detector.
        images: All test images, empty ones too.
        classes: Names of the classes.
        groups: Patient of each image, or None.
        draws: Bootstrap draws.
        seed: Of the bootstrap.
        froc_overlap: Overlap from which a box counts as found in FROC; one of `OVERLAPS`.

    Returns:
        JSON-able rows {name, probe, metric, class, value, low, high, n_images, n_patients, by, n_boxes}; the first is the main score.
        Values are None where a class has no box. FROC over all classes has `at`: rate -> sensitivity.
    """
    matches = match_classes(images, len(classes))
    half = [pick(m, 0.5) for m in matches]
    pooled = together([pick(m, froc_overlap) for m in matches])
    real = [int(m.real.sum()) for m in matches]
    asked: list[tuple[str, str | None, Any, int]] = [
        ("map_10_50", None, lambda times: mean_average_precision(matches, times), sum(real)),
        ("map_50", None, lambda times: mean_average_precision(half, times), sum(real)),
    ]
    for k, own in enumerate(classes):
        asked.append(("ap_10_50", own, lambda times, k=k: average_precision(matches[k], times).mean(), real[k]))
        asked.append(("ap_50", own, lambda times, k=k: average_precision(half[k], times).mean(), real[k]))
    asked.append(("froc", None, lambda times: mean_sensitivity(pooled, times), sum(real)))
    places = np.arange(len(images), dtype=np.float64)
    rows = []
    for metric, label, score, boxes in asked:
        value, low, high = bootstrap_interval(places, groups, draws=draws, seed=seed, statistic=over_images(score, len(images)))
        row: dict[str, Any] = {
            "name": name, "probe": "finetune", "metric": metric, "class": label, "value": _plain(value), "low": _plain(low),
            "high": _plain(high), "n_images": len(images), "n_patients": None if groups is None else len(set(groups)),
            "by": "by image" if groups is None else "by patient", "n_boxes": boxes,
        }  # fmt: skip
        if metric == "froc":
            row |= {"overlap": froc_overlap, "at": {f"{rate:g}": _plain(v) for rate, v in zip(RATES, froc(pooled)[0])}}
        rows.append(row)
    return rows


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
