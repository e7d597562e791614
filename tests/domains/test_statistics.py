"""Statistics and foreground against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.domains.mri import MRI
from medssl.domains.statistics import (
    QUANTILES,
    body_threshold,
    foreground,
    foreground_points,
    intensity_stats,
    otsu_threshold,
    sample,
)
from medssl.domains.volume_files import read_volume
from tests.synthetic import oblique_volume


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_intensity_stats__equal_numpy_on_the_foreground(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medssl.domains.statistics.SLAB_VOXELS", 500)
    array = oblique_volume()[0]
    if dtype == "uint16":
        array = (array.astype(np.int32) * 140).astype(np.uint16)  # above what int16 holds
    else:
        array = (array // 2).astype(dtype) if dtype == "uint8" else (array - 150).astype(dtype)
    if dtype == "float32":
        array = array + np.float32(0.25)
    mask = array > np.median(array)
    stats = intensity_stats(array, mask)
    values = array[mask].astype(np.float64)
    assert stats["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert stats["std"] == pytest.approx(values.std(), rel=1e-9)
    assert (stats["min"], stats["max"]) == (values.min(), values.max())
    assert stats["foreground_fraction"] == mask.mean()
    for name, q in QUANTILES.items():
        assert stats[name] == pytest.approx(np.quantile(values, q), rel=1e-6)


def test_intensity_stats__fraction_counts_valid_voxels_only() -> None:
    array = oblique_volume()[0]
    valid = np.ones(array.shape, dtype=bool)
    valid[:10] = False
    mask = foreground(array, valid)
    assert not mask[:10].any()
    assert intensity_stats(array, mask, valid)["foreground_fraction"] == mask.sum() / valid.sum()


def test_otsu__separates_as_well_as_plain_search() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(20, 5, 3000), rng.normal(90, 12, 2000)])
    low, high = np.quantile(values, [0.005, 0.995])
    clipped = np.clip(values, low, high)

    def between(threshold: float) -> float:
        dark, bright = clipped[clipped <= threshold], clipped[clipped > threshold]
        return float(len(dark) * len(bright) * (dark.mean() - bright.mean()) ** 2)

    best = max(between(float(edge)) for edge in np.linspace(low, high, 257)[1:-1])
    assert between(otsu_threshold(values)) > 0.9999 * best


def test_otsu__in_the_middle_of_a_gap() -> None:
    assert otsu_threshold(np.repeat([0.0, 10.0], 500)) == pytest.approx(5, abs=0.05)


def test_body_threshold__air_is_cut_and_a_crop_without_air_is_all_body() -> None:
    rng = np.random.default_rng(0)
    tissue = np.concatenate([rng.normal(60, 8, 3000), rng.normal(120, 8, 3000)])
    assert body_threshold(tissue) == -np.inf
    with_air = np.concatenate([np.abs(rng.normal(0, 3, 8000)), tissue])
    assert 10 < body_threshold(with_air) < 40


def test_foreground__never_empty() -> None:
    array = np.zeros((6, 6, 6), dtype=np.int16)
    array[1, 2, 3] = 5
    assert foreground(array).any()


def test_foreground__finds_the_ellipsoid() -> None:
    array = oblique_volume()[0]
    body = array > 100
    mask = foreground(array)
    assert 2 * (mask & body).sum() / (mask.sum() + body.sum()) > 0.99


def test_foreground_points__inside_spread_and_deterministic() -> None:
    mask = np.zeros((30, 40, 20), dtype=bool)
    mask[:10], mask[20:] = True, True
    points = foreground_points(mask, 512)
    assert points.shape == (512, 3) and points.dtype == np.uint16
    assert mask[tuple(points.T.astype(int))].all()
    assert len(np.unique(points, axis=0)) == 512
    np.testing.assert_array_equal(points, foreground_points(mask.copy(), 512))
    # Equal shares: both halves hold as many points as voxels, whatever the seed.
    assert (points[:, 0] < 10).sum() == 256
    np.testing.assert_allclose(points[:, 1].mean(), 19.5, atol=1.5)


def test_foreground_points__all_of_a_small_foreground_and_of_a_view() -> None:
    mask = np.zeros((5, 6, 7), dtype=bool)
    mask[1, 2, 3] = mask[4, 0, 6] = True
    np.testing.assert_array_equal(foreground_points(mask), [[1, 2, 3], [4, 0, 6]])
    flipped = mask.transpose(2, 1, 0)[::-1]
    np.testing.assert_array_equal(foreground_points(flipped), np.argwhere(flipped))


def test_sample__strided_grid_of_bounded_size() -> None:
    array = np.zeros((100, 120, 80), dtype=np.uint8)
    assert array[sample(array, 1000)].size <= 1000
    assert array[sample(array, 10**7)].shape == array.shape


def test_domain_statistics__computed_and_not_applied(shared_data: Path) -> None:
    path = shared_data / "msd_hippocampus/images/hippocampus_001.nii.gz"
    read = MRI().read([path], series_id="0" * 32)
    np.testing.assert_array_equal(read.image[0], read_volume([path]).array)
    # A crop inside the head: everything is body, so these are the statistics of all voxels.
    assert read.meta.stats["foreground_fraction"] == 1
    assert read.meta.stats["mean"] == pytest.approx(read.image.mean(dtype=np.float64), rel=1e-8)
    assert read.meta.stats["p95"] == pytest.approx(np.quantile(read.image, 0.95), rel=1e-8)


def test_foreground_points__of_an_image() -> None:
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:40, 20:65] = True
    points = foreground_points(mask, 100)
    assert points.shape == (100, 2) and points.dtype == np.uint16
    assert mask[tuple(points.T.astype(int))].all() and len(np.unique(points, axis=0)) == 100
    assert np.abs(points.mean(axis=0) - np.argwhere(mask).mean(axis=0)).max() < 3
    np.testing.assert_array_equal(foreground_points(mask, 10_000), np.argwhere(mask))
