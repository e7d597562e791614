from __future__ import annotations

import math

import numpy as np
import pytest

from medssl.evaluation.metrics import dice, hd95_mm, mean_score


def plain_dice(p: np.ndarray, t: np.ndarray, structure: int) -> float:
    both = either = 0
    for a, b in zip(p.ravel().tolist(), t.ravel().tolist()):
        both += a == structure and b == structure
        either += (a == structure) + (b == structure)
    return 2 * both / either


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels of a mask with a face neighbour outside it, by loops."""
    found: list[tuple[int, ...]] = []
    for index in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                other = index.copy()
                other[axis] += step
                inside = all(0 <= o < n for o, n in zip(other, mask.shape))
                if not inside or not mask[tuple(other)]:
                    found.append(tuple(int(v) for v in index))
    return sorted(set(found))


def plain_hd95(p: np.ndarray, t: np.ndarray, spacing: tuple[float, float, float]) -> float:
    a = np.array(surface(p)) * np.array(spacing)
    b = np.array(surface(t)) * np.array(spacing)
    directed = []
    for source, target in ((a, b), (b, a)):
        nearest = [min(float(np.linalg.norm(x - y)) for y in target) for x in source]
        directed.append(float(np.quantile(nearest, 0.95)))
    return max(directed)


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (11, 9, 8)], indexing="ij"), axis=-1)
    maps = []
    for _ in range(2):
        label = np.zeros(grid.shape[:3], np.int16)
        for value, centre in ((1, (3, 3, 3)), (2, (7, 5, 4))):
            radius = rng.uniform(1.8, 3.0)
            label[np.linalg.norm(grid - np.array(centre) - rng.normal(0, 0.7, 3), axis=-1) < radius] = value
        maps.append(label)
    return maps[0], maps[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores__equal_plain_loops(seed: int) -> None:
    prediction, label = blobs(seed)
    spacing = (0.7, 1.3, 2.5)
    overlap = dice(prediction, label, (1, 2))
    distance = hd95_mm(prediction, label, (1, 2), spacing)
    for structure in (1, 2):
        assert overlap[structure] == pytest.approx(plain_dice(prediction, label, structure), abs=1e-12)
        expected = plain_hd95(prediction == structure, label == structure, spacing)
        assert distance[structure] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("axis", "shift"), [(0, 1), (1, 2), (2, 3)])
def test_hd95__of_a_shifted_cube_is_the_shift_in_mm(axis: int, shift: int) -> None:
    spacing = (0.5, 1.5, 3.0)
    label = np.zeros((20, 20, 20), np.int16)
    label[5:11, 5:11, 5:11] = 1
    moved = np.roll(label, shift, axis=axis)
    assert hd95_mm(moved, label, (1,), spacing)[1] == pytest.approx(shift * spacing[axis])
    assert hd95_mm(label, label, (1,), spacing)[1] == 0


def test_hd95__does_not_depend_on_the_empty_space_around() -> None:
    prediction, label = blobs(3)
    wide, wide_label = (np.pad(a, ((30, 5), (0, 40), (11, 2))) for a in (prediction, label))
    assert hd95_mm(wide, wide_label, (1,), (1, 2, 3)) == hd95_mm(prediction, label, (1,), (1, 2, 3))


def test_absent_structures__are_left_out_or_cost_the_diagonal() -> None:
    label = np.zeros((4, 4, 4), np.int16)
    label[1, 1, 1] = 1
    nothing = np.zeros_like(label)
    assert dice(nothing, label, (1, 2))[1] == 0
    assert math.isnan(dice(nothing, label, (1, 2))[2])
    distance = hd95_mm(nothing, label, (1, 2), (1.0, 2.0, 2.0))
    assert distance[1] == pytest.approx(12.0)  # (4, 8, 8) mm
    assert math.isnan(distance[2])
    assert mean_score({1: 0.5, 2: math.nan}) == 0.5
    assert math.isnan(mean_score({1: math.nan}))
