"""How a volume is cut into slices: for whoever looks at volumes slice by slice, the same way as the views show slices."""

from __future__ import annotations

from torch import Tensor


def slices_of(volumes: Tensor, axis: int, *, channels: bool = True) -> Tensor:
    """Cut RAS+ volumes into slices, each turned as a radiologist looks at it.

    So are the slices that a network is pretrained on (`sampling.planes.display`); cut in array order instead, an axial slice would be
    transposed and upside down, and every feature another one, without any error.

    Args:
        volumes: (..., C, X, Y, Z), or (..., X, Y, Z) without `channels`.
        axis: Slice axis, 0, 1 or 2 for X, Y or Z.
        channels: Whether there is a channel axis; slices come before it.

    Returns:
        (..., N, C, H, W) or (..., N, H, W). Axial: rows from anterior to posterior, columns from the patient's right to left. Coronal:
        from superior to inferior, from right to left. Sagittal: from superior to inferior, from anterior to posterior. Slices keep the
        order of the array.
    """
    return volumes.movedim(axis - 3, -4 if channels else -3).transpose(-1, -2).flip(-2, -1)
