from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl.views.fields import (
    MAX_SIGMA,
    displacement_field,
    displacement_nodes,
    field_nodes,
    gaussian_field,
    min_jacobian,
    node_step,
    upsample_nodes,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum_slope(field: Tensor, spacing_mm: tuple[float, ...], low: int, high: int) -> float:
    """Fit log(radial mean of power) over log k, for shells low..high in units of the lowest frequency."""
    power = torch.fft.fftn(field.double(), dim=(1, 2, 3)).abs().square().mean(0).numpy()
    k = np.sqrt(
        sum(np.square(f) for f in np.meshgrid(*(np.fft.fftfreq(n, s) for n, s in zip(power.shape, spacing_mm)), indexing="ij"))
    )
    shell = np.rint(k * max(n * s for n, s in zip(power.shape, spacing_mm))).astype(int).ravel()
    count = np.maximum(np.bincount(shell), 1)
    mean_power, mean_k = np.bincount(shell, power.ravel()) / count, np.bincount(shell, k.ravel()) / count
    return float(np.polyfit(np.log(mean_k[low : high + 1]), np.log(mean_power[low : high + 1]), 1)[0])


@pytest.mark.parametrize("exponent", [2, 3, 4, 5, 6])
def test_gaussian_field__power_falls_with_the_exponent(exponent: float) -> None:
    field = gaussian_field((48, 48, 48), (1, 1, 1), exponent, generator(0), count=12)
    assert spectrum_slope(field, (1, 1, 1), 2, 20) == pytest.approx(-exponent, abs=0.2)
    assert torch.allclose(field.mean(dim=(1, 2, 3)), torch.zeros(12), atol=1e-5)
    assert torch.allclose(field.std(dim=(1, 2, 3)), torch.ones(12), atol=1e-3)


def test_gaussian_field__is_isotropic_in_mm_not_in_voxels() -> None:
    spacing = (1.0, 1.0, 3.0)
    field = gaussian_field((60, 60, 20), spacing, 5, generator(1), count=16)
    assert spectrum_slope(field, spacing, 2, 9) == pytest.approx(-5, abs=0.2)
    steps = [(field.diff(dim=axis + 1) / spacing[axis]).square().mean() for axis in range(3)]
    assert steps[2] / steps[0] == pytest.approx(1, abs=0.25)  # mean square slope per mm


@pytest.mark.parametrize("exponent", [4, 5, 6])
def test_upsampled_field__keeps_the_slope_at_full_resolution(exponent: float) -> None:
    # 24^3 nodes of 4 voxels, closed to a torus so that no window blurs the spectrum; their Nyquist frequency is 12
    nodes = gaussian_field((24, 24, 24), (4, 4, 4), exponent, generator(2), count=16, interpolated=(True, True, True))
    for dim in (1, 2, 3):
        nodes = torch.cat([nodes, nodes.narrow(dim, 0, 1)], dim=dim)
    assert node_step(96) == 4
    field = upsample_nodes(nodes, (96, 96, 96))
    assert spectrum_slope(field, (1, 1, 1), 2, 9) == pytest.approx(-exponent, abs=0.2)


def test_upsample_nodes__equals_trilinear_interpolation() -> None:
    size = (70, 33, 9)
    steps = [node_step(n) for n in size]
    assert steps == [4, 2, 1]
    nodes = field_nodes(size, (1, 1, 1), 4, generator(3), count=2)
    full = [step * (m - 1) + 1 for step, m in zip(steps, nodes.shape[1:])]
    expected = torch.nn.functional.interpolate(nodes[None], size=full, mode="trilinear", align_corners=True)[0]
    assert torch.allclose(upsample_nodes(nodes, size), expected[:, :70, :33, :9], atol=1e-5)


def test_field_nodes__are_not_periodic() -> None:
    field = upsample_nodes(field_nodes((64, 64, 64), (1, 1, 1), 5, generator(4), count=8), (64, 64, 64))
    across = (field[:, 0] - field[:, -1]).square().mean()
    beside = (field[:, 0] - field[:, 1]).square().mean()
    assert across > 100 * beside


@pytest.mark.parametrize("size", [(96, 80, 64), (20, 9, 1), (12, 7, 5)])
def test_field__has_equal_bits_on_any_number_of_threads(size: tuple[int, int, int]) -> None:
    before = torch.get_num_threads()
    fields = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            fields.append(displacement_field(size, (1, 1, 2), amplitude=0.03, exponent=5, generator=generator(5)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fields[0], fields[1]) and torch.equal(fields[0], fields[2])
    assert not torch.equal(fields[0], displacement_field(size, (1, 1, 2), amplitude=0.03, exponent=5, generator=generator(6)))


def jacobians(u: np.ndarray, spacing_mm: tuple[float, ...], sides: tuple[int, int, int]) -> np.ndarray:
    """Determinants of I + du/dx at inner voxels, per axis backward (-1), central (0) or forward (1) differences."""
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    columns = []
    for axis, side in enumerate(sides):
        ahead, behind = np.roll(u, -1, axis + 1), np.roll(u, 1, axis + 1)
        column = {1: ahead - u, -1: u - behind, 0: (ahead - behind) / 2}[side][inner] / spacing_mm[axis]
        column[axis] += 1
        columns.append(column)
    x, y, z = columns
    return (x * np.cross(y, z, axis=0)).sum(axis=0)


@pytest.mark.parametrize("amplitude", [0.03, 0.3, 2.0])
@pytest.mark.parametrize(("size", "spacing_mm"), [((64, 48, 32), (1.0, 1.0, 1.0)), ((48, 40, 12), (0.7, 0.7, 5.0))])
def test_displacement__never_folds(amplitude: float, size: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> None:
    for seed in range(2 if amplitude < 1 else 1):
        nodes = displacement_nodes(size, spacing_mm, amplitude=amplitude, exponent=5, generator=generator(seed))
        bound = float(min_jacobian(nodes, [node_step(n) * s for n, s in zip(size, spacing_mm)]))
        u = upsample_nodes(nodes, size).double().numpy()
        assert bound > 0.1
        for sides in [(0, 0, 0), *itertools.product((-1, 1), repeat=3)]:
            assert jacobians(u, spacing_mm, sides).min() > bound - 1e-4
        reach = np.abs(u).max(axis=(1, 2, 3)) / (np.asarray(size) * spacing_mm)
        assert (reach <= MAX_SIGMA * amplitude * 1.0001).all()
        if amplitude > 0.1:
            assert bound < 0.3  # scaled down as little as needed, not switched off


def test_min_jacobian__sees_a_fold_and_a_known_determinant() -> None:
    grid = torch.stack(torch.meshgrid(*(torch.arange(4.0) * s for s in (1, 2, 3)), indexing="ij"))
    stretched = grid * torch.tensor([0.5, -0.25, 1.0]).view(3, 1, 1, 1)
    assert float(min_jacobian(stretched, (1, 2, 3))) == pytest.approx(1.5 * 0.75 * 2.0, rel=1e-6)
    folded = torch.zeros(3, 4, 4, 4)
    folded[0, 2] = -1.5
    assert float(min_jacobian(folded, (1, 1, 1))) == pytest.approx(-0.5, rel=1e-6)


def test_displacement__amplitude_is_a_share_of_the_side_in_mm() -> None:
    size, spacing = (32, 32, 16), (1.0, 2.0, 2.0)
    fields = [displacement_field(size, spacing, amplitude=0.005, exponent=5, generator=generator(seed)) for seed in range(25)]
    share = torch.stack(fields).square().mean(dim=(0, 2, 3, 4)).sqrt() / torch.tensor([32.0, 64.0, 32.0])
    assert torch.allclose(share, torch.full((3,), 0.005), rtol=0.2)
