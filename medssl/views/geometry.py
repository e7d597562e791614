"""The geometry of a view: one map from output voxels to item millimetres, and one interpolation.

Output voxel i of a view of n voxels of size s has the offset o = (i + 0.5 - n / 2) * s from the view's centre c and
takes its value at

    p = c + R S F (o + u(i))

with F the flips (diagonal of +1 and -1), S the isotropic scale, R the rotation and u the displacement in mm. All of
p, c, o, u are mm; p and c count from the outer corner of voxel 0 along the item's axes (see `medssl.types.Box`). A
scale above 1 lets the view cover more of the body. Since u is added before the linear part, the Jacobian of the map
is R S F (I + du/do) and it folds exactly when I + du/do does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.views.fields import upsample_nodes


def rotation_matrix(degrees: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return Rz @ Ry @ Rx for right-handed angles about X, Y, Z.

    Args:
        degrees: (..., 3) angles in degrees.

    Returns:
        (..., 3, 3) float64.
    """
    angle = np.deg2rad(np.asarray(degrees, dtype=np.float64))
    cos, sin = np.cos(angle), np.sin(angle)
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(cos, -1, 0), np.moveaxis(sin, -1, 0)
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def view_matrix(flip: Sequence[bool], rotate_deg: Sequence[float], scale: float) -> np.ndarray:
    """Return R S F of the module's formula, (3, 3) float64."""
    signs = np.where(np.asarray(flip, dtype=bool), -1.0, 1.0)
    return rotation_matrix(rotate_deg) * scale * signs


@lru_cache(maxsize=1024)  # one entry per spacing in an archive, asked for at every draw
def reach_mm(
    half_mm: tuple[float, float, float], rotate_deg: tuple[float, float, float], scale: float
) -> tuple[float, float, float]:
    """Return how far a view can reach from its centre along each item axis, whatever angles are drawn.

    Args:
        half_mm: Half edges of the view, displacement included.
        rotate_deg: Largest angle about each axis; angles lie in [-r, r].
        scale: Largest scale.

    Returns:
        Upper bound in mm of |scale * R o| per axis, over all angles and all |o| <= half_mm.
    """
    half = np.asarray(half_mm, dtype=np.float64)
    radius = float(np.linalg.norm(half))
    limits = np.minimum(np.asarray(rotate_deg, dtype=np.float64), 180.0)
    points = 13
    axes = [np.linspace(-r, r, points) if r else np.zeros(1) for r in limits]
    angles = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    reach = (np.abs(rotation_matrix(angles)) @ half).reshape(-1, 3).max(axis=0)
    # The reach is a maximum of functions that are sinusoids in each angle. At its peak an angle is either at its
    # limit, which is on the grid, or has slope 0: then the nearest grid point misses radius * x^2 / 2 at most, x the
    # angle between them.
    between = np.deg2rad(limits.sum()) / (points - 1)
    x, y, z = scale * np.minimum(reach + radius * between**2 / 2, radius)
    return float(x), float(y), float(z)


def sampling_grid(
    size: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    matrix: np.ndarray,
    centre_mm: Sequence[float] | np.ndarray,
    source_shape: Sequence[int],
    source_spacing_mm: Sequence[float] | np.ndarray,
    displacement: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return where each output voxel lies in a source array.

    Args:
        size: Output size in voxels.
        spacing_mm: Output voxel size.
        matrix: (3, 3), R S F.
        centre_mm: View centre, from the outer corner of the source's voxel 0.
        source_shape: Source size in voxels.
        source_spacing_mm: Source voxel size.
        displacement: (3, *nodes) node displacement u in mm, or None.
        device: Where the grid is made.

    Returns:
        (3, *size) float32, -1 at the source's outer lower corner and +1 at its outer upper corner along each axis;
        inside the source the absolute value is at most 1. This is `grid_sample`'s convention for align_corners=False,
        and the first axis holds Z, Y, X in this order: the order `grid_sample` wants.
    """
    to_grid = 2.0 / (np.asarray(source_shape, dtype=np.float64) * np.asarray(source_spacing_mm, dtype=np.float64))
    linear = matrix * to_grid[:, None]  # (3 source axes, 3 view axes), per mm of the view
    offsets = [(np.arange(n) + 0.5 - n / 2) * s for n, s in zip(size, spacing_mm)]
    parts = [linear[:, b, None] * offsets[b] for b in range(3)]
    parts[0] = parts[0] + (np.asarray(centre_mm, dtype=np.float64) * to_grid - 1.0)[:, None]
    # Computed in float64 along single axes, rounded once, then added over the volume.
    packed = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32)[::-1].copy()).to(device)  # Z, Y, X
    x, y, z = torch.tensor_split(packed, np.cumsum(size)[:2].tolist(), dim=1)
    plane = y[:, :, None] + z[:, None, :]
    if displacement is None:
        return x[:, :, None, None] + plane[:, None]
    mix = torch.from_numpy(linear.astype(np.float32)[::-1].copy()).to(device)
    nodes = sum_columns(mix, displacement)
    return upsample_nodes(nodes, size).add_(plane[:, None]).add_(x[:, :, None, None])


def sum_columns(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return matrix @ vector at every position, without a matrix product (which may round to TF32).

    Args:
        matrix: (3, 3).
        vectors: (3, ...).

    Returns:
        (3, ...).
    """
    column = (3, *[1] * (vectors.dim() - 1))
    out = matrix[:, 0].view(column) * vectors[0]
    out = out + matrix[:, 1].view(column) * vectors[1]
    return out + matrix[:, 2].view(column) * vectors[2]


def sample(source: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Interpolate a source at grid positions.

    Args:
        source: (C, X, Y, Z) float32.
        grid: (3, *size), from `sampling_grid`.
        mode: `bilinear` (trilinear in 3D; beyond the outermost voxel centres their values continue) or `nearest` (0
            outside).

    Returns:
        (C, *size) float32.
    """
    size = grid.shape[1:]
    points = grid.permute(1, 2, 3, 0)
    # grid_sample spreads a batch over CPU threads, not the voxels of one volume: slabs of the output play the batch.
    slabs = 1 if source.is_cuda else max(d for d in range(1, 9) if size[0] % d == 0)
    out = F.grid_sample(
        source.expand(slabs, -1, -1, -1, -1),
        points.reshape(slabs, size[0] // slabs, size[1], size[2], 3),
        mode=mode,
        padding_mode="zeros" if mode == "nearest" else "border",
        align_corners=False,
    )
    return out.transpose(0, 1).reshape(source.shape[0], *size)


def inside(grid: Tensor) -> Tensor:
    """Return (*size) bool: True where a grid position lies inside the source array."""
    return (grid.abs() <= 1).all(dim=0)


def grid_to_mm(grid: Tensor, source_shape: Sequence[int], source_spacing_mm: Sequence[float], origin_mm: np.ndarray) -> Tensor:
    """Turn grid positions into item millimetres.

    Args:
        grid: (3, *size), from `sampling_grid`.
        source_shape: Source size in voxels.
        source_spacing_mm: Source voxel size.
        origin_mm: (3,) outer corner of the source's voxel 0 in the item's axes.

    Returns:
        (3, *size) float32, mm.
    """
    half = np.asarray(source_shape) * np.asarray(source_spacing_mm, dtype=np.float64) / 2
    packed = torch.from_numpy(np.stack([half, origin_mm + half]).astype(np.float32)).to(grid.device)
    return grid.flip(0) * packed[0].view(3, 1, 1, 1) + packed[1].view(3, 1, 1, 1)


def touched_voxels(
    half_mm: Sequence[float], *, matrix: np.ndarray, centre_mm: np.ndarray, spacing_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the block of source voxels that holds every position of a view and one voxel more on each side.

    Args:
        half_mm: Half edges of the block of voxel centres of the view, largest displacement included.
        matrix: R S F.
        centre_mm: View centre, from the source's outer lower corner.
        spacing_mm: Source voxel size.

    Returns:
        First voxel and the one after the last, (3,) int64 each; may lie outside the source.
    """
    reach = np.abs(matrix) @ np.asarray(half_mm, dtype=np.float64)
    low = np.floor((centre_mm - reach) / spacing_mm + 1e-6) - 1
    high = np.ceil((centre_mm + reach) / spacing_mm - 1e-6) + 1
    return low.astype(np.int64), high.astype(np.int64)
