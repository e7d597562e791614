"""The only place where a grid becomes a sequence of tokens and back.

Token n of a grid (X, Y, Z) is the cell (x, y, z) with n = (x * Y + y) * Z + z: X varies slowest, as in MONAI's ViT. Everything that
meets tokens (images, masks, position tables, bias tables) goes through this pair, because two flattenings that differ by a transposition
run without an error on cubic grids and quietly score the wrong voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

TOKEN_ORDER = "n = (x * Y + y) * Z + z"


def flatten_tokens(x: Tensor) -> Tensor:
    """Flatten a grid of features into tokens.

    Args:
        x: (B, E, *grid).

    Returns:
        (B, N, E) with N = prod(grid).
    """
    return x.flatten(2).transpose(1, 2)  # (B, E, N) -> (B, N, E)


def unflatten_tokens(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Put tokens back on their grid; inverse of `flatten_tokens`.

    Args:
        tokens: (B, N, E) with N = prod(grid).
        grid: Token grid.

    Returns:
        (B, E, *grid).
    """
    if tokens.shape[1] != prod(grid):
        raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {tuple(grid)} ({prod(grid)} cells)")
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut a volume into patches, one row of voxels per token.

    Args:
        x: (B, C, *size), every size a multiple of the patch.
        patch: Patch size per axis.

    Returns:
        (B, N, C * prod(patch)); voxels of a patch in C, X, Y, Z order, tokens as in `flatten_tokens`.
    """
    batch, channels, *size = x.shape
    dims = len(patch)
    grid = [n // p for n, p in zip(size, patch)]
    split = x.reshape(batch, channels, *[edge for pair in zip(grid, patch) for edge in pair])
    order = [0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)]  # B, C, patch axes, grid axes
    return flatten_tokens(split.permute(order).reshape(batch, channels * prod(patch), *grid))


def unpatchify(rows: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int = 1) -> Tensor:
    """Put rows of voxels back into a volume; inverse of `patchify`.

    Args:
        rows: (B, N, C * prod(patch)).
        grid: Token grid.
        patch: Patch size per axis.
        channels: C.

    Returns:
        (B, C, *size) with size = grid * patch.
    """
    dims = len(patch)
    x = unflatten_tokens(rows, grid).reshape(rows.shape[0], channels, *patch, *grid)
    order = [0, 1] + [axis for i in range(dims) for axis in (2 + dims + i, 2 + i)]  # B, C, gx, px, gy, py, gz, pz
    return x.permute(order).reshape(rows.shape[0], channels, *[g * p for g, p in zip(grid, patch)])


def visible_indices(mask: Tensor) -> Tensor:
    """Return the indices of visible tokens.

    Args:
        mask: (B, *grid) bool, True = hidden, the same number hidden in every row.

    Returns:
        (B, N_visible) int64, ascending.
    """
    visible = ~flatten_tokens(mask[:, None])[..., 0]  # (B, N)
    counts = visible.sum(dim=1)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(f"token dropping needs equal counts per sample; got {counts.tolist()} visible tokens")
    return visible.nonzero()[:, 1].reshape(mask.shape[0], -1)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Select tokens.

    Args:
        tokens: (B, N, E).
        index: (B, K) int64.

    Returns:
        (B, K, E).
    """
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def scatter_tokens(tokens: Tensor, index: Tensor, fill: Tensor) -> Tensor:
    """Put tokens at their places among copies of a fill token.

    Args:
        tokens: (B, K, E).
        index: (B, K) int64.
        fill: (B, N, E), the token for every place, for instance an expanded mask token.

    Returns:
        (B, N, E).
    """
    return fill.scatter(1, index[..., None].expand(-1, -1, tokens.shape[2]), tokens)


def valid_tokens(valid: Tensor, patch: Sequence[int], share: float = 0.25) -> Tensor:
    """Return which tokens of clips show enough that is real.

    Args:
        valid: (B, T, H, W) bool pixels: inside the sector, of a frame that is there.
        patch: (frames, rows, columns) of a token.
        share: A token is valid when at least this share of its pixels is, in each of its frames: a tubelet that is half padding would
            show a change that never was.

    Returns:
        (B, N) bool.
    """
    rows = patchify(valid[:, None], patch)
    return (rows.reshape(*rows.shape[:2], patch[0], -1).float().mean(dim=3) >= share).all(dim=2)
