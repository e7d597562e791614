"""Average precision and FROC by hand, against a slow implementation of the definition, and against MONAI's COCO metric."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.detection import (
    OVERLAPS,
    RATES,
    ImageBoxes,
    Matches,
    average_precision,
    box_iou,
    detection_rows,
    froc,
    match,
    match_classes,
    mean_average_precision,
    outcomes,
    score_threshold,
    together,
)


def image(real: Any = (), found: Any = (), *, ignore: Any = None, labels: Any = None, dims: int = 2) -> ImageBoxes:
    """Real boxes, and found ones as (*box, score) or (*box, score, label)."""
    boxes = np.asarray(real, dtype=float).reshape(-1, 2 * dims)
    rows = np.asarray(found, dtype=float).reshape(len(found), -1) if len(found) else np.zeros((0, 2 * dims + 1))
    kinds = rows[:, 2 * dims + 1].astype(int) if rows.shape[1] > 2 * dims + 1 else np.zeros(len(rows), dtype=int)
    own = np.zeros(len(boxes), dtype=int) if labels is None else np.asarray(labels)
    hidden = np.zeros(len(boxes), dtype=bool) if ignore is None else np.asarray(ignore, dtype=bool)
    return ImageBoxes(boxes, own, hidden, rows[:, : 2 * dims], kinds, rows[:, 2 * dims])


A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)


def test_iou__by_hand() -> None:
    assert box_iou(np.array([A]), np.array([A, (5, 0, 15, 10), FAR]))[0].tolist() == [1.0, 50 / 150, 0.0]
    cube = np.array([[0, 0, 0, 2, 2, 2]])
    assert box_iou(cube, np.array([[1, 0, 0, 3, 2, 2]]))[0, 0] == pytest.approx(4 / 12)
    assert box_iou(np.zeros((0, 4)), np.array([A])).shape == (0, 1)
    assert box_iou(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 1]]))[0, 0] == 0


def test_average_precision__by_hand() -> None:
    """Right, wrong, right over two boxes: precision 1 up to recall 0.5 (51 of 101 points), then 2/3 (50 points)."""
    m = match([image([A, B], [(*A, 0.9), (*FAR, 0.8), (*B, 0.7)])], 0, [0.5])
    assert m.right.tolist() == [[1, 0, 1]]
    assert average_precision(m)[0] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_box_found_twice__is_right_once_and_the_better_score_has_it() -> None:
    m = match([image([A], [(*A, 0.5), (1, 0, 10, 10, 0.9)])], 0, [0.5])
    assert m.scores.tolist() == [0.9, 0.5] and m.right.tolist() == [[1, 0]]


def test_best_of_several_free_boxes__is_taken() -> None:
    near = (2, 0, 12, 10)
    m = match([image([near, A], [(*A, 0.9), (*near, 0.8)])], 0, [0.1])
    assert m.right.tolist() == [[1, 1]]


def test_equal_scores__have_no_order() -> None:
    """Right and wrong at the same score: precision 1/2, whichever comes first, in one image or in two."""
    one = [match([image([A], order)], 0, [0.5]) for order in ([(*A, 0.5), (*FAR, 0.5)], [(*FAR, 0.5), (*A, 0.5)])]
    two = [match(pair, 0, [0.5]) for pair in itertools.permutations([image([A], [(*A, 0.5)]), image([], [(*FAR, 0.5)])])]
    assert [float(average_precision(m)[0]) for m in (*one, *two)] == [0.5] * 4


def test_empty_images__are_negatives() -> None:
    full, empty = image([A], [(*A, 0.5)]), image([], [(*FAR, 0.9)])
    assert average_precision(match([full], 0, [0.5]))[0] == 1
    assert average_precision(match([full, empty], 0, [0.5]))[0] == 0.5
    assert froc(match([full, empty], 0, [0.5]), rates=[0.25, 0.5]).tolist() == [[0.0, 1.0]]
    assert froc(match([full, *[image()] * 3, empty], 0, [0.5]), rates=[0.125, 0.25]).tolist() == [[0.0, 1.0]]  # 1 in 5 images


def test_ignored_boxes__count_neither_way() -> None:
    hidden = image([A, B], [(*A, 0.9), (*B, 0.8), (1, 0, 10, 10, 0.7)], ignore=[True, False])
    m = match([hidden], 0, [0.5])
    assert m.right.tolist() == [[-1, 1, -1]] and m.real.tolist() == [1]
    assert average_precision(m)[0] == 1
    both = image([A, (0, 0, 10, 9)], [(*A, 0.9)], ignore=[True, False])  # the real one comes first, though the other fits better
    assert match([both], 0, [0.5]).right.tolist() == [[1]]


def test_regions__excuse_all_that_is_found_inside_them() -> None:
    """Small boxes in a crowd overlap it by little, and objects by more than one: a single ignored object excuses them not."""
    crowd, small, half = (0, 0, 100, 100), (5, 5, 15, 15), (-10, 40, 10, 60)
    found = [(*small, 0.9), (*half, 0.8), (200, 0, 210, 10, 0.7)]
    region = replace(image([crowd], found, ignore=[True]), region=np.array([True]))
    assert match([region], 0, [0.5]).right.tolist() == [[-1, -1, 0]]
    assert match([replace(region, region=None)], 0, [0.5]).right.tolist() == [[0, 0, 0]]


def test_class_without_a_box__has_no_score_and_leaves_the_mean() -> None:
    images = [image([A], [(*A, 0.9, 0), (*FAR, 0.8, 1)])]
    ms = match_classes(images, 2)
    assert np.isnan(average_precision(ms[1])).all() and mean_average_precision(ms) == 1
    assert math.isnan(mean_average_precision([ms[1]]))
    with pytest.raises(RequestError, match="no image"):
        match_classes([], 2)


def test_froc__by_hand() -> None:
    """Four images, four boxes; from the best score: right, wrong, right, wrong, wrong, right."""
    found = [[(*A, 0.9), (*FAR, 0.8)], [(*A, 0.7), (*FAR, 0.6)], [(*FAR, 0.5)], [(*A, 0.4)]]
    m = match([image([A], boxes) for boxes in found], 0, [0.5])
    assert froc(m, rates=[0, 0.125, 0.25, 0.5, 0.75, 8]).tolist() == [[0.25, 0.25, 0.5, 0.5, 0.75, 0.75]]
    assert froc(m)[0, -1] == 0.75 and len(RATES) == 7


def slow_share(found: np.ndarray, region: np.ndarray) -> float:
    """How much of a found box lies in a region, one axis after the other."""
    dims, share = len(found) // 2, 1.0
    for axis in range(dims):
        inside = min(found[axis + dims], region[axis + dims]) - max(found[axis], region[axis])
        share *= max(inside, 0.0) / (found[axis + dims] - found[axis])
    return share


def slow_average_precision(images: list[ImageBoxes], label: int, threshold: float) -> float:
    """The definition, one score threshold at a time: keep what is at or above it, match it anew, note recall and precision."""
    points = []
    scores = sorted({float(s) for one in images for s in one.scores[one.found_labels == label]}, reverse=True)
    total = sum(int(((one.labels == label) & ~one.ignore).sum()) for one in images)
    for lowest in scores:
        hits = misses = 0
        for one in images:
            taken: set[int] = set()
            kept = [k for k in range(len(one.scores)) if one.found_labels[k] == label and one.scores[k] >= lowest]
            for k in sorted(kept, key=lambda k: -one.scores[k]):
                best, best_value, excused = None, threshold, False
                for j in range(len(one.boxes)):
                    if one.labels[j] != label or j in taken:
                        continue
                    value = float(box_iou(one.found[k : k + 1], one.boxes[j : j + 1])[0, 0])
                    if one.ignore[j] and one.regions[j]:
                        value = slow_share(one.found[k], one.boxes[j])
                    if one.ignore[j]:
                        excused = excused or value >= threshold
                    elif value > best_value or (best is None and value >= threshold):
                        best, best_value = j, value
                if best is not None:
                    taken.add(best)
                    hits += 1
                elif not excused:
                    misses += 1
        points.append((hits / total, hits / (hits + misses) if hits + misses else 0.0))
    at = [max((p for r, p in points if r >= level - 1e-12), default=0.0) for level in np.linspace(0, 1, 101)]
    return float(np.mean(at))


def random_images(seed: int, dims: int = 2, n: int = 8, ties: bool = True, crowds: bool = False) -> list[ImageBoxes]:
    rng = np.random.default_rng(seed)
    images = []
    for number in range(n):
        count = 0 if number == 0 else int(rng.integers(0, 5))
        low = rng.uniform(0, 40, (count, dims))
        boxes = np.concatenate([low, low + rng.uniform(5, 20, (count, dims))], axis=1)
        seen = boxes[rng.random(count) < 0.8] + rng.normal(0, 1.5, 1)
        stray = rng.uniform(0, 40, (3, dims))
        found = np.concatenate([seen, np.concatenate([stray, stray + rng.uniform(5, 20, (3, dims))], axis=1)])
        scores = rng.random(len(found))
        if ties:
            scores = np.round(scores, 1)
        labels = rng.integers(0, 2, count)
        kinds = rng.integers(0, 2, len(found))
        hidden = rng.random(count) < (0.4 if crowds else 0.2)
        images.append(
            ImageBoxes(boxes, labels, hidden, found, kinds, scores, hidden & (rng.random(count) < 0.5) if crowds else None)
        )
    return images


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision__is_that_of_the_definition(dims: int, seed: int) -> None:
    images = random_images(seed, dims, crowds=True)
    for label in (0, 1):
        fast = average_precision(match(images, label, [0.1, 0.3, 0.5]))
        slow = [slow_average_precision(images, label, t) for t in (0.1, 0.3, 0.5)]
        assert fast == pytest.approx(slow, nan_ok=True)


def whole_average_precision(matches: Matches, times: np.ndarray) -> np.ndarray:
    """Every box counted for every threshold, precision at every score."""
    each = np.asarray(times, dtype=np.float64)[matches.image]
    ends = np.flatnonzero(np.append(matches.scores[1:] < matches.scores[:-1], True)) if len(matches.scores) else np.zeros(0, int)
    right, wrong = (np.cumsum((matches.right == kind) * each, axis=1)[:, ends] for kind in (1, 0))
    real = float((times * matches.real).sum())
    if real == 0 or not right.shape[1]:
        return np.full(len(right), np.nan if real == 0 else 0.0)
    precision = np.divide(right, right + wrong, out=np.zeros_like(right), where=right + wrong > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros(len(right))
    for row in range(len(right)):
        place = np.searchsorted(right[row] / real, np.linspace(0, 1, 101) - 1e-12)
        found[row] = best[row, place[place < right.shape[1]]].sum() / 101
    return found


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_average_precision_of_draws__is_the_same_number_as_counting_every_box(seed: int, ties: bool) -> None:
    images = random_images(seed, n=12, ties=ties, crowds=seed % 2 == 1)
    rng = np.random.default_rng(seed)
    for label in range(4):  # nobody has the last
        matches = match(images, label)
        for times in [np.ones(12, int), *(np.bincount(rng.integers(12, size=12), minlength=12) for _ in range(20))]:
            assert np.array_equal(average_precision(matches, times), whole_average_precision(matches, times), equal_nan=True)


def test_average_precision__is_that_of_monai() -> None:
    """MONAI's COCO metric, without ties (its order among equal scores is that of the images)."""
    from monai.apps.detection.metrics.coco import COCOMetric
    from monai.apps.detection.metrics.matching import matching_batch

    images = random_images(5, dims=3, n=12, ties=False)
    metric = COCOMetric(classes=["a", "b"], iou_list=list(OVERLAPS), max_detection=[100])
    results = matching_batch(
        iou_fn=box_iou,
        iou_thresholds=metric.iou_thresholds,
        pred_boxes=[one.found for one in images],
        pred_classes=[one.found_labels for one in images],
        pred_scores=[one.scores for one in images],
        gt_boxes=[one.boxes for one in images],
        gt_classes=[one.labels for one in images],
        gt_ignore=[one.ignore.astype(float) for one in images],
        max_detections=100,
    )
    theirs = metric(results)[0]
    ours = match_classes(images, 2)
    assert mean_average_precision(ours) == pytest.approx(theirs["mAP_IoU_0.10_0.50_0.05_MaxDet_100"], abs=1e-6)
    for name, m in zip("ab", ours):
        assert average_precision(m).mean() == pytest.approx(theirs[f"{name}_mAP_IoU_0.10_0.50_0.05_MaxDet_100"], abs=1e-6)


def test_counting_an_image_twice__is_having_it_twice() -> None:
    images = random_images(7)
    times = np.array([2, 0, 1, 1, 3, 0, 1, 0])
    repeated = [one for one, n in zip(images, times) for _ in range(n)]
    for a, b in zip(match_classes(images, 2), match_classes(repeated, 2)):
        assert average_precision(a, times) == pytest.approx(average_precision(b), nan_ok=True)
        assert froc(a, times) == pytest.approx(froc(b), nan_ok=True)
    all_classes = together(match_classes(images, 2))
    assert all_classes.real.sum() == sum((~one.ignore).sum() for one in images)


def test_rows__have_intervals_by_patient() -> None:
    images = random_images(3)
    groups = [f"p{k // 2}" for k in range(8)]
    rows = detection_rows("toy", images, ["a", "b"], groups, draws=50)
    assert [row["metric"] for row in rows] == ["map_10_50", "map_50", "ap_10_50", "ap_50", "ap_10_50", "ap_50", "froc"]
    assert rows[0]["value"] == pytest.approx(mean_average_precision(match_classes(images, 2)))
    assert all(row["low"] <= row["value"] <= row["high"] and row["n_patients"] == 4 and row["by"] == "by patient" for row in rows)
    assert list(rows[-1]["at"]) == ["0.125", "0.25", "0.5", "1", "2", "4", "8"]
    alone = detection_rows("toy", images, ["a", "b", "c"], None, draws=10)
    assert alone[0]["by"] == "by image" and next(row for row in alone if row["class"] == "c")["value"] is None


def test_outcomes__agree_with_matching_and_say_which_object_was_missed() -> None:
    one = image([A, B, FAR], [(*A, 0.9), (*A, 0.8), (40, 40, 44, 44, 0.7), (*B, 0.2), (*FAR, 0.6)], ignore=[0, 0, 1])
    real, found = outcomes(one, 0.5)
    assert real.tolist() == [1, 0, -1] and found.tolist() == [1, 0, 0, -2, -1]
    real, found = outcomes(one, 0.1)
    m = match([one], 0, [0.1])
    assert real.tolist() == [1, 1, -1] and sorted(found) == sorted(m.right[0])
    other = image([A], [(*A, 0.9, 1)], labels=[0])
    assert [part.tolist() for part in outcomes(other, 0.5)] == [[0], [0]]  # of another class: missed, and wrong


def test_score_threshold__is_where_froc_is_read() -> None:
    images = [image([A, B], [(*A, 0.9), (*FAR, 0.8), (*B, 0.7), (*FAR, 0.6)]), image((), [(*A, 0.65)])]
    m = match(images, 0, [0.1])
    for rate in (0.25, 0.5, 1.0, 2.0):
        threshold = score_threshold(m, rate)
        counts = [outcomes(one, threshold) for one in images]
        assert sum((found == 0).sum() for _, found in counts) <= 2 * rate
        assert sum((real == 1).sum() for real, _ in counts) / 2 == froc(m, rates=[rate])[0, 0]
    assert score_threshold(match([image([A])], 0, [0.1]), 1.0) == 0.0
    assert score_threshold(match([image((), [(*A, 0.9)])], 0, [0.1]), 0.5) > 0.9


def test_score_threshold__reaches_down_to_the_first_score_that_is_too_many() -> None:
    clean = match([image([A], [(*A, 0.95)])], 0, [0.1])
    assert score_threshold(clean, 1.0) == 0.0  # nothing was found for nothing: no score of other cases is too low
    busy = match([image([A], [(*A, 0.9), (*FAR, 0.4), (*FAR, 0.3), (*FAR, 0.2)])], 0, [0.1])
    assert 0.3 < score_threshold(busy, 1.0) < 0.3001
    assert 0.2 < score_threshold(busy, 2.0) < 0.2001 and score_threshold(busy, 3.0) == 0.0
