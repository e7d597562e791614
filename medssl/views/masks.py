"""Block masks on a grid of cells: which part of a view is hidden from the encoder. True = hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from medssl.errors import RequestError


def block_mask(grid: Sequence[int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Hide exactly `int(ratio * N)` of the N cells of a grid, all choices equally likely.

    Args:
        grid: Number of cells along each axis, for instance (6, 6, 6); need not be cubic.
        ratio: Hidden share, 0 <= ratio < 1.
        rng: Explicit generator.

    Returns:
        (*grid) bool, True = hidden.

    Reference:
        He et al. 2022, "Masked autoencoders are scalable vision learners", section 3: uniform sampling without
        replacement. The count is the same for all views, so that visible tokens of a batch stack without padding.
    """
    if not 0 <= ratio < 1:
        raise RequestError(f"mask ratio {ratio}; accepted is 0 <= ratio < 1; set the share of hidden cells, for instance 0.75")
    n = math.prod(grid)
    mask = np.zeros(n, dtype=bool)
    mask[rng.permutation(n)[: int(ratio * n)]] = True
    return mask.reshape(tuple(grid))


def upsample_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat each cell so that a mask of cells becomes a mask of voxels (nearest neighbour).

    Args:
        mask: (B, *grid) or any other leading axes, True = hidden.
        size: Spatial size in voxels; a multiple of the grid along each axis.

    Returns:
        (B, *size), dtype as given.
    """
    first = mask.dim() - len(size)
    for axis, n in enumerate(size):
        cells = mask.shape[first + axis]
        if cells == 0 or n % cells:
            raise RequestError(
                f"a mask of grid {tuple(mask.shape[first:])} cannot be repeated to size {tuple(size)}; accepted are "
                "sizes that are multiples of the grid along each axis; change the size or the cell"
            )
        mask = mask.repeat_interleave(n // cells, dim=first + axis)
    return mask
