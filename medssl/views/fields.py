"""Smooth Gaussian random fields, and displacement fields that never fold.

Fields are drawn on a coarse grid of nodes, a whole number of voxels apart, and made full size by trilinear
interpolation. Node spacing is in mm, so that a field is isotropic in the body whatever the voxel shape.

Reference:
    Random-field augmentations, arXiv 2311.03629: phi = Re F^-1(|k|^(-g/2) F(w)), w white noise, k != 0, standardised.
    Here phi comes from a canvas 1.5 times the view and is cut out, since a field made by FFT is periodic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CANVAS = 1.5  # canvas side over view side: opposite faces of the view are then 0.5 sides apart on the torus
MAX_SIGMA = 3.0  # a component never moves a voxel further than this many standard deviations, so that the margin is finite
MIN_JACOBIAN = 0.1
_SHRINK = 0.85  # factor per try while a displacement folds


def node_step(n: int) -> int:
    """Return the number of voxels between nodes for a view of n voxels: 4 from 64 voxels on, finer for small views."""
    return max(1, min(4, n // 16))


def node_count(n: int) -> int:
    """Return the number of nodes along an axis of n voxels; the last one lies at or beyond the last voxel."""
    return math.ceil(n / node_step(n)) + 1


def gaussian_field(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    exponent: float,
    generator: torch.Generator,
    *,
    count: int = 1,
    interpolated: Sequence[bool] = (False, False, False),
) -> Tensor:
    """Draw periodic Gaussian random fields whose power falls as |k|^-exponent, k in cycles per mm.

    Args:
        shape: Grid (X, Y, Z) of the periodic canvas.
        spacing_mm: Distance between grid points along each axis.
        exponent: Spectral exponent g > 0; larger is smoother.
        generator: Fields are made on its device.
        count: Number of independent fields.
        interpolated: Axes along which the field will be interpolated linearly between its grid points. That multiplies
            the spectrum by sinc^2(k * spacing) per axis; it is divided by it here, so that the slope survives.

    Returns:
        (count, X, Y, Z) float32, each with mean 0 and standard deviation 1 over the canvas.
    """
    device = generator.device
    gain = _gain(tuple(shape), tuple(spacing_mm), exponent, tuple(interpolated), device)
    noise = torch.randn(count, *shape, generator=generator, device=device)
    if device.type == "cpu":
        # numpy's transform runs on one thread. torch's gives other bits on other numbers of threads for some shapes.
        spectrum = np.fft.rfftn(noise.numpy(), axes=(1, 2, 3)) * gain.numpy()
        waves = np.fft.irfftn(spectrum, s=tuple(shape), axes=(1, 2, 3))
        return torch.from_numpy((waves / waves.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32, copy=False))
    field: Tensor = torch.fft.irfftn(torch.fft.rfftn(noise, dim=(1, 2, 3)) * gain, s=tuple(shape), dim=(1, 2, 3))
    return field / field.std(dim=(1, 2, 3), correction=0, keepdim=True)


@lru_cache(maxsize=64)
def _gain(
    shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    exponent: float,
    interpolated: tuple[bool, ...],
    device: torch.device,
) -> Tensor:
    """Return |k|^(-exponent / 2) on the half spectrum of a real transform, 0 at k = 0, in arbitrary units."""
    axes = [np.fft.fftfreq(n, d=s) for n, s in zip(shape, spacing_mm)]
    axes[-1] = np.fft.rfftfreq(shape[-1], d=spacing_mm[-1])
    columns = [k.reshape([-1 if a == axis else 1 for a in range(3)]) for axis, k in enumerate(axes)]
    k2 = columns[0] ** 2 + columns[1] ** 2 + columns[2] ** 2
    k2[0, 0, 0] = np.inf
    gain = (k2 / k2.min()) ** (-exponent / 4)
    for k, s, linear in zip(columns, spacing_mm, interpolated):
        if linear:
            gain = gain / np.sinc(k * s) ** 2
    return torch.from_numpy(gain.astype(np.float32)).to(device)


def field_nodes(
    size: Sequence[int], spacing_mm: Sequence[float], exponent: float, generator: torch.Generator, *, count: int = 1
) -> Tensor:
    """Draw smooth fields for a view, as values at its nodes.

    Args:
        size: View size in voxels.
        spacing_mm: Voxel size of the view.
        exponent: Spectral exponent.
        generator: As in `gaussian_field`.
        count: Number of independent fields.

    Returns:
        (count, *nodes) with `node_count` nodes per axis; not periodic.
    """
    nodes = [node_count(n) for n in size]
    canvas = [_fast_length(math.ceil(CANVAS * m)) for m in nodes]
    spacing = [node_step(n) * s for n, s in zip(size, spacing_mm)]
    coarse = [node_step(n) > 1 for n in size]
    field = gaussian_field(canvas, spacing, exponent, generator, count=count, interpolated=coarse)
    return field[:, : nodes[0], : nodes[1], : nodes[2]].contiguous()


def upsample_nodes(nodes: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate node values trilinearly at the voxels of a view.

    Args:
        nodes: (C, *nodes), as from `field_nodes`; node j lies on voxel j * node_step(n).
        size: View size in voxels.

    Returns:
        (C, *size).
    """
    # The last axis first: the large arrays then come out contiguous. addcmul is one pass and, unlike a matrix
    # product, never TF32.
    for axis in (3, 2, 1):
        n = size[axis - 1]
        step = node_step(n)
        fraction = torch.arange(step, device=nodes.device, dtype=nodes.dtype) / step
        low = nodes.narrow(axis, 0, nodes.shape[axis] - 1).unsqueeze(axis + 1)
        slope = nodes.diff(dim=axis).unsqueeze(axis + 1)
        nodes = torch.addcmul(low, slope, fraction.view((step,) + (1,) * (3 - axis)))
        nodes = nodes.flatten(axis, axis + 1).narrow(axis, 0, n)
    return nodes


def min_jacobian(nodes_mm: Tensor, spacing_mm: Sequence[float]) -> Tensor:
    """Return a lower bound of det(I + du/dx) of a displacement interpolated trilinearly between nodes.

    Inside a cell each column of du/dx is a weighted mean of the differences along the 4 edges of that direction, and
    a determinant is linear in each column. So it is a weighted mean of the 4 * 4 * 4 determinants built from one edge
    of each direction, and their least value bounds it: at every point of the cell, and for one-sided or central
    differences between the voxels of the view as well.

    Args:
        nodes_mm: (3, *nodes), displacement in mm.
        spacing_mm: Distance between nodes along each axis.

    Returns:
        Scalar.
    """
    columns = []
    for axis in range(3):
        column = nodes_mm.diff(dim=axis + 1) / spacing_mm[axis]
        column[axis] += 1
        across = [a + 1 for a in range(3) if a != axis]
        edges = [
            column.narrow(across[0], i, column.shape[across[0]] - 1).narrow(across[1], j, column.shape[across[1]] - 1)
            for i in (0, 1)
            for j in (0, 1)
        ]
        columns.append(torch.stack(edges, dim=1).flatten(2))  # (3 components, 4 edges, cells)
    a, (b, c) = columns[0], (columns[1][:, :, None], columns[2][:, None, :])
    cross = torch.stack([b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]]).flatten(1, 2)
    least = [(a[0, i] * cross[0]).addcmul_(a[1, i], cross[1]).addcmul_(a[2, i], cross[2]).min() for i in range(4)]
    return torch.stack(least).min()


def displacement_nodes(
    size: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    amplitude: float,
    exponent: float,
    generator: torch.Generator,
    floor: float = MIN_JACOBIAN,
) -> Tensor:
    """Draw a displacement field that does not fold.

    Each component is a smooth field of standard deviation `amplitude` times the side of the view along that axis,
    bounded by `MAX_SIGMA` of them. All components are scaled down together until the Jacobian determinant stays above
    `floor` everywhere.

    Args:
        size: View size in voxels.
        spacing_mm: Voxel size of the view.
        amplitude: Standard deviation as a share of the side, >= 0; 0.03 is a good start.
        exponent: Spectral exponent; 5 is a good start.
        generator: As in `gaussian_field`.
        floor: Least accepted det(I + du/dx), below 1.

    Returns:
        (3, *nodes), displacement in mm.
    """
    field = field_nodes(size, spacing_mm, exponent, generator, count=3)
    excess = field.abs().amax(dim=(1, 2, 3), keepdim=True) / MAX_SIGMA
    sides = torch.tensor([n * s for n, s in zip(size, spacing_mm)], dtype=field.dtype, device=field.device)
    nodes = field / excess.clamp_min(1) * (amplitude * sides).view(3, 1, 1, 1)
    spacing = [node_step(n) * s for n, s in zip(size, spacing_mm)]
    while not bool(min_jacobian(nodes, spacing) > floor):
        nodes = nodes * _SHRINK
    return nodes


def displacement_field(
    size: Sequence[int], spacing_mm: Sequence[float], *, amplitude: float, exponent: float, generator: torch.Generator
) -> Tensor:
    """Return the displacement of `displacement_nodes` at every voxel.

    Returns:
        (3, *size), mm along the axes of the view.
    """
    nodes = displacement_nodes(size, spacing_mm, amplitude=amplitude, exponent=exponent, generator=generator)
    return upsample_nodes(nodes, size)


def _fast_length(n: int) -> int:
    """Return the least length >= n whose only prime factors are 2, 3 and 5."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
