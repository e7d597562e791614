"""Sanity experiment A10.4 of the method card, at its own sizes and against its reference values."""

from __future__ import annotations

import pytest

from benchmarks.learnability import train


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_region_of_loss__leaves_its_signature() -> None:
    """Card: 300 steps, 128 phantoms; visible/masked error 7.7 when only hidden voxels are scored, 0.45 when all are."""
    masked, visible, atlas = train(128, 300, "masked")
    assert masked < 0.35  # card 0.206, predict-zero 1.02
    assert masked > atlas * 0.9  # card: 300 steps do not beat the atlas (0.177)
    assert visible / masked > 5
    masked_all, visible_all, _ = train(128, 300, "all")
    assert visible_all / masked_all < 1
    assert masked_all < 0.35


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_learnability__beats_the_mean_atlas() -> None:
    """Card: 2,000 steps on 512 phantoms reach 0.096 against 0.198 for the mean atlas."""
    masked, visible, atlas = train(512, 2000, "masked")
    assert atlas == pytest.approx(0.198, abs=0.03)
    assert masked < 0.75 * atlas
    assert visible / masked > 5
