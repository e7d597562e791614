from __future__ import annotations

import numpy as np
import pytest
import torch

from medssl.views.geometry import inside, reach_mm, rotation_matrix, sample, sampling_grid, view_matrix


def loop_trilinear(source: np.ndarray, position: np.ndarray) -> float:
    """Trilinear value at a position in voxel units (voxel i at i), by a plain loop."""
    base = np.floor(position).astype(int)
    total = 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([f if c else 1 - f for c, f in zip(corner, position - base)])
        index = np.clip(base + corner, 0, np.asarray(source.shape) - 1)
        total += float(weight * source[tuple(index)])
    return total


def test_rotation_matrix__is_rz_ry_rx_right_handed() -> None:
    assert np.allclose(rotation_matrix([0, 0, 90]) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(rotation_matrix([90, 0, 0]) @ [0, 1, 0], [0, 0, 1])
    assert np.allclose(rotation_matrix([0, 90, 0]) @ [0, 0, 1], [1, 0, 0])
    x, y, z = (rotation_matrix([a, b, c]) for a, b, c in [(10, 0, 0), (0, 20, 0), (0, 0, 30)])
    assert np.allclose(rotation_matrix([10, 20, 30]), z @ y @ x)
    assert np.linalg.det(view_matrix([True, False, False], [10, 20, 30], 1.5)) == pytest.approx(-(1.5**3))


def test_sampling__equals_a_plain_loop_on_an_anisotropic_source() -> None:
    rng = np.random.default_rng(0)
    source, spacing = rng.normal(size=(14, 9, 11)).astype(np.float32), np.array([1.0, 2.5, 1.5])
    size, out_spacing = (4, 3, 5), (0.8, 1.3, 1.1)
    matrix = view_matrix([False, True, False], [10, -20, 35], 1.2)
    centre = np.array([7.2, 11.0, 8.1])
    u = rng.normal(size=(3, 5, 4, 6)).astype(np.float32) * 0.3
    grid = sampling_grid(
        size,
        out_spacing,
        matrix=matrix,
        centre_mm=centre,
        source_shape=source.shape,
        source_spacing_mm=spacing,
        displacement=torch.from_numpy(u),
        device=torch.device("cpu"),
    )
    out = sample(torch.from_numpy(source)[None], grid, "bilinear")[0].numpy()
    for index in np.ndindex(*size):
        offset = (np.asarray(index) + 0.5 - np.asarray(size) / 2) * out_spacing
        position = centre + matrix @ (offset + u[(slice(None), *index)])  # views below 32 voxels have a node at every voxel
        assert out[index] == pytest.approx(loop_trilinear(source, position / spacing - 0.5), abs=2e-5)
    assert bool(inside(grid).all())


def test_sample__splits_the_output_into_slabs_without_changing_a_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    source, grid = torch.randn(2, 9, 8, 7, generator=rng), torch.rand(3, 12, 5, 6, generator=rng) * 2.2 - 1.1
    whole = torch.nn.functional.grid_sample(
        source[None], grid.permute(1, 2, 3, 0)[None], padding_mode="border", align_corners=False
    )[0]
    assert torch.equal(sample(source, grid, "bilinear"), whole)


@pytest.mark.parametrize("limits", [(0, 0, 0), (0, 0, 25), (15, 15, 15), (30, 5, 60), (180, 180, 180)])
def test_reach_mm__bounds_random_rotations_and_is_tight(limits: tuple[float, float, float]) -> None:
    half = (48.0, 40.0, 20.0)
    reach = np.array(reach_mm(half, limits, 1.3))
    angles = np.random.default_rng(0).uniform(-1, 1, (20000, 3)) * limits
    seen = 1.3 * (np.abs(rotation_matrix(angles)) @ half).max(axis=0)
    assert (seen <= reach + 1e-9).all()
    assert (reach <= seen * 1.12).all()
