"""Search in an embedding: exact against a plain search of every cell, refinement, quantisation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from medssl.matching.base import MatchVolume, no_matches
from medssl.matching.cells import CellMap, VolumeEmbedding, quantise, unit
from medssl.matching.embedding import match_embeddings
from medssl.types import ImageMeta, Sample


def smooth(rng: np.random.Generator, grid: tuple[int, ...], channels: int, sigma: float) -> np.ndarray:
    return np.stack([gaussian_filter(rng.normal(size=grid), sigma) for _ in range(channels)], axis=-1)


def embedding(seed: int = 0, grid: tuple[int, ...] = (16, 12, 20), key: str = "k", air: bool = True) -> VolumeEmbedding:
    """Fine cells of 4 mm, coarse ones of 16 mm, centres as those of strided convolutions at 2 mm."""
    rng = np.random.default_rng(seed)
    fine = smooth(rng, grid, 12, 1.5).astype(np.float32)
    if air:
        fine[:2] = 0
    coarse = smooth(rng, tuple(n // 4 for n in grid), 12, 0.7).astype(np.float32)
    return VolumeEmbedding(
        CellMap(quantise(unit(fine))[0], np.full(3, 1.0), np.full(3, 4.0)),
        CellMap(quantise(unit(coarse))[0], np.full(3, 1.0), np.full(3, 16.0)),
        key,
        f"{seed:032x}",
    )


def frame(grid: tuple[int, ...] = (16, 12, 20), affine: np.ndarray | None = None) -> MatchVolume:
    image = np.zeros((1, *(2 * n for n in grid)), dtype=np.int16)
    sample = Sample(image, (2.0, 2.0, 2.0), np.diag([2.0, 2, 2, 1]) if affine is None else affine, None, ImageMeta("0" * 32, "mri"))
    return MatchVolume.of_sample(sample)


def plain_scores(found: VolumeEmbedding, fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Card alice, section 3, with SciPy: the coarse map trilinear on the fine grid, re-normalised, then the mean of two cosines."""
    f = found.fine.vectors.astype(np.float64)
    c = found.coarse.vectors.astype(np.float64)
    c /= np.linalg.norm(c, axis=-1, keepdims=True)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in found.fine.grid], indexing="ij"))
    places = (found.fine.origin_mm[:, None, None, None] + index * 4.0 - found.coarse.origin_mm[:, None, None, None]) / 16.0
    up = np.stack([map_coordinates(c[..., e], places, order=1, mode="nearest") for e in range(c.shape[-1])], axis=-1)
    up /= np.linalg.norm(up, axis=-1, keepdims=True)
    length = np.linalg.norm(f, axis=-1)
    scores = ((f @ fine) / np.maximum(length, 1e-12) + up @ coarse) / 2
    scores[length == 0] = np.nan
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_best_cell__equals_a_search_of_every_cell(seed: int) -> None:
    there = embedding(seed)
    rng = np.random.default_rng(seed + 50)
    for fine, coarse in [tuple(unit(rng.normal(size=(2, 12)).astype(np.float32))) for _ in range(4)]:
        expected = plain_scores(there, fine, coarse)
        assert there.best_cell(fine, coarse) == int(np.nanargmax(expected))
        found = there.similarity(fine, coarse)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found[np.isfinite(found)], expected[np.isfinite(expected)], atol=2e-6)


def test_self_match__error_0_and_score_1() -> None:
    here, volume = embedding(), frame()
    cells = np.array([[5, 3, 7], [8, 8, 2], [15, 11, 19], [3, 0, 0]])
    world = volume.to_world(here.fine.origin_mm + cells * 4.0)
    found = match_embeddings(here, volume, world, here, volume)
    np.testing.assert_allclose(found.points_mm, world, atol=1e-9)
    np.testing.assert_allclose(found.scores, 1.0, atol=1e-6)


def test_self_match_between_cells__within_a_64th_of_a_cell() -> None:
    here, volume = embedding(), frame()
    rng = np.random.default_rng(3)
    world = volume.to_world(here.fine.origin_mm + rng.uniform(3, 10, size=(20, 3)) * 4.0)
    found = match_embeddings(here, volume, world, here, volume)
    assert np.abs(found.points_mm - world).max() <= 4.0 / 64 + 1e-9
    assert found.scores.min() > 0.999


def test_refinement__finds_a_shift_of_a_third_of_a_cell() -> None:
    """The same field sampled on a grid that lies 1.4 mm further: matches must move by that, not by whole cells."""
    rng = np.random.default_rng(0)
    k, phase = rng.normal(0, 2 * np.pi / 60, size=(3, 12)), rng.uniform(0, 2 * np.pi, 12)
    some = embedding().coarse
    flat = CellMap(np.full_like(some.vectors, 9), some.origin_mm, some.step_mm)
    cells = np.stack(np.meshgrid(*[np.arange(n) * 4.0 for n in (12, 11, 15)], indexing="ij"), axis=-1)
    first, second = (
        VolumeEmbedding(
            CellMap(quantise(unit(np.cos((cells + moved) @ k + phase).astype(np.float32)))[0], np.ones(3), np.full(3, 4.0)),
            flat,
            "k",
        )
        for moved in (0.0, 1.4)
    )
    volume = frame()
    world = volume.to_world(first.fine.origin_mm + np.random.default_rng(1).integers(3, 9, size=(25, 3)) * 4.0)
    found = match_embeddings(first, volume, world, second, volume)
    error = np.abs(found.points_mm - (world - 1.4))
    assert np.median(error) < 0.3 and error.max() < 1.0  # a whole cell is 4 mm


def test_points_without_a_match__nan_and_0() -> None:
    here, volume = embedding(), frame()
    world = volume.to_world(np.array([[2.0, 20.0, 20.0], [-30.0, 20.0, 20.0], [30.0, 20.0, 20.0]]))  # air, outside, body
    found = match_embeddings(here, volume, world, here, volume)
    assert np.isnan(found.points_mm[:2]).all() and np.isfinite(found.points_mm[2]).all()
    assert found.scores[:2].tolist() == [0, 0] and found.scores[2] > 0.99
    assert np.isnan(no_matches(2).points_mm).all()


def test_other_weights_or_spacing__are_refused() -> None:
    from medssl.errors import RequestError

    volume = frame()
    with pytest.raises(RequestError, match="made with different weights, spacing or step, and such vectors cannot be compared"):
        match_embeddings(embedding(0), volume, np.zeros((1, 3)), embedding(1, key="other"), volume)


@pytest.mark.parametrize("points", [[1.0, 2.0, 3.0], [[1.0, 2.0]], [], [[np.nan, 0, 0]], "here"])
def test_bad_points__are_a_sentence(points: object) -> None:
    from medssl.errors import RequestError
    from medssl.matching.base import checked_points

    with pytest.raises(RequestError, match="points: accepted are triples of finite numbers x, y, z in world mm"):
        checked_points(points)


def test_frames__world_and_item_mm_are_inverse_and_agree_with_nibabel() -> None:
    import nibabel as nib

    from tests.synthetic import oblique_affine

    affine = oblique_affine()
    spacing = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    volume = MatchVolume("v", affine, spacing, (20, 26, 14), lambda: None)  # type: ignore[arg-type, return-value]
    index = np.random.default_rng(0).uniform(0, 14, size=(9, 3))
    world = nib.affines.apply_affine(affine, index)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(volume.to_item(world), (index + 0.5) * spacing, atol=1e-9)
    np.testing.assert_allclose(volume.to_world(volume.to_item(world)), world, atol=1e-9)


def test_quantise__half_a_step_at_most() -> None:
    x = unit(np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32))
    q, scale = quantise(x)
    assert q.dtype == np.int8 and np.abs(q).max() == 127
    assert np.abs(q * scale - x).max() <= scale / 2 + 1e-7
