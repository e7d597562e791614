"""Position tables: fixed sine-cosine, and resizing of learned ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl.layers.tokens import flatten_tokens, unflatten_tokens


def sincos_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Fixed sine-cosine positions over a grid of any number of axes.

    The channels are shared out evenly over the axes, sine and cosine at frequencies 10000^(-i/n); what does not divide is left zero.

    Args:
        grid: Token grid.
        dim: Channels E.

    Returns:
        (1, N, E) float32 in the order of `flatten_tokens`.

    Reference:
        Vaswani et al. 2017, section 3.5, one axis; He et al. 2022 (MAE), 2D; here for D axes.
    """
    return sincos_at([torch.arange(length, dtype=torch.float64) for length in grid], dim)


def sincos_at(places: Sequence[Tensor], dim: int) -> Tensor:
    """Fixed sine-cosine positions of cells at any places along each axis, between whole numbers too; see `sincos_positions`.

    Args:
        places: For each axis, the place of every cell on it, (length,) float64.
        dim: Channels E.

    Returns:
        (1, N, E) float32 in the order of `flatten_tokens`.
    """
    grid = [len(place) for place in places]
    per_axis = dim // (2 * len(grid))
    frequency = 10000.0 ** (-torch.arange(per_axis, dtype=torch.float64) / max(per_axis, 1))
    maps = []
    for axis, (length, place) in enumerate(zip(grid, places)):
        angle = place[:, None] * frequency  # (length, per_axis)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (length, 2 * per_axis)
        shape = [1] * len(grid)
        shape[axis] = length
        maps.append(wave.T.reshape(2 * per_axis, *shape).expand(2 * per_axis, *grid))
    table = torch.cat([*maps, torch.zeros(dim - 2 * per_axis * len(grid), *grid, dtype=torch.float64)])
    return flatten_tokens(table[None]).float()


def resized_places(length: int, table: int) -> Tensor:
    """Return where the cells of an axis lie on an axis of another number of cells, both spanning the same, cell centres aligned.

    Args:
        length: Cells wanted.
        table: Cells of the axis that positions were learned on.

    Returns:
        (length,) float64: (i + 0.5) * table / length - 0.5; whole numbers where both are equal.
    """
    return (torch.arange(length, dtype=torch.float64) + 0.5) * table / length - 0.5


def resize_positions(table: Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Resize a learned position table to another token grid by linear interpolation (trilinear in 3D, cell centres aligned).

    Args:
        table: (1, N_old, E).
        old_grid: Grid the table was learned on.
        new_grid: Grid wanted.

    Returns:
        (1, N_new, E); the table itself when the grids are equal.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(new_grid)]
    maps = unflatten_tokens(table.float(), old_grid)
    resized = nn.functional.interpolate(maps, size=tuple(new_grid), mode=mode, align_corners=False)
    return flatten_tokens(resized).to(table.dtype)
