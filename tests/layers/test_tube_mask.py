"""Tube masks: exact counts, one pattern for all tubelets, the sector first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.layers.tube_mask import tube_masks, tube_pattern


@pytest.mark.parametrize(("grid", "ratio", "hidden"), [((7, 7), 0.9, 44), ((6, 6), 0.5, 18), ((3, 5), 0.75, 11), ((2, 2), 0.0, 0)])
def test_pattern__hides_exactly_the_share(grid: tuple[int, int], ratio: float, hidden: int) -> None:
    patterns = [tube_pattern(np.ones(grid, dtype=bool), ratio, np.random.default_rng(seed)) for seed in range(20)]
    assert all(int(pattern.sum()) == hidden for pattern in patterns)


def test_pattern__shows_each_place_about_equally_often() -> None:
    shown = sum((~tube_pattern(np.ones((7, 7), dtype=bool), 0.9, np.random.default_rng(s))).astype(int) for s in range(2000))
    expected, deviation = 2000 * 5 / 49, (2000 * 5 / 49 * 44 / 49) ** 0.5
    assert abs(shown - expected).max() < 4.5 * deviation


def test_pattern__takes_visible_places_inside_the_sector_first() -> None:
    inside = np.zeros((7, 7), dtype=bool)
    inside[2:5, 1:5] = True
    for seed in range(50):
        shown = ~tube_pattern(inside, 0.9, np.random.default_rng(seed))
        assert shown.sum() == 5 and shown[inside].sum() == 5


@pytest.mark.parametrize(("count", "seen"), [(0, 0), (1, 1), (2, 1), (3, 2), (5, 4), (6, 5)])
def test_pattern__of_a_small_sector_still_hides_some_of_it(count: int, seen: int) -> None:
    inside = np.zeros(49, dtype=bool)
    inside[:count] = True
    shown = ~tube_pattern(inside, 0.9, np.random.default_rng(0))
    assert shown.sum() == 5 and shown[:count].sum() == seen


def test_masks__are_one_pattern_for_all_tubelets_and_depend_on_their_seed_alone() -> None:
    valid = torch.ones(3, 4, 7, 7, dtype=torch.bool)
    seeds = [(0, 5, n) for n in range(3)]
    masks = tube_masks(valid, 0.9, 5, seeds)
    assert masks.shape == (3, 5, 4, 7, 7)
    assert (masks == masks[:, :, :1]).all() and (masks.flatten(2).sum(dim=2) == 4 * 44).all()
    assert len({tuple(m.flatten().tolist()) for m in masks[:, :, 0].flatten(0, 1)}) == 15
    assert torch.equal(tube_masks(valid[1:], 0.9, 5, seeds[1:]), masks[1:])
    assert not torch.equal(tube_masks(valid, 0.9, 5, [(0, 6, n) for n in range(3)]), masks)
