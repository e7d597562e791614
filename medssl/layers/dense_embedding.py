"""Two embedding maps from a feature pyramid: a fine one and a coarse one, both of unit length at every cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class DenseEmbedding(nn.Module):
    """Feature pyramid with two outputs.

    Every level is normalised, made `dim` channels wide and added to what comes down from the coarser ones; the finest one that is used
    becomes the fine map. The coarsest level alone becomes the coarse map.

    Args:
        channels: Channels of the pyramid's levels, fine to coarse.
        strides: Voxels per cell and axis of these levels.
        fine_stride: Stride of the fine map; one of `strides`, not the last.
        dim: Channels of both maps.

    Reference:
        Yan et al. 2022 (TMI), "SAM: self-supervised learning of pixel-wise anatomical embeddings", section III-A. The fine map sees
        the coarsest level too, where theirs stops one below.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], *, fine_stride: int = 2, dim: int = 64) -> None:
        super().__init__()
        if fine_stride not in list(strides)[:-1]:
            raise ValueError(
                f"fine_stride is {fine_stride}; accepted: {', '.join(str(s) for s in list(strides)[:-1]) or 'none'} (strides of the "
                f"encoder's pyramid below its coarsest, {list(strides)[-1:]})"
            )
        self.first = list(strides).index(fine_stride)
        self.fine_stride, self.coarse_stride, self.dim = fine_stride, strides[-1], dim
        used = channels[self.first :]
        self.lateral = nn.ModuleList(nn.Sequential(nn.GroupNorm(_groups(n), n), nn.ReLU(), nn.Conv3d(n, dim, 1)) for n in used)
        self.fine = nn.Conv3d(dim, dim, 3, padding=1)
        self.coarse = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the fine and the coarse map.

        Args:
            pyramid: (B, C_i, *size_i), fine to coarse, all levels of the encoder.

        Returns:
            (B, dim, *size_fine) and (B, dim, *size_coarse), of length 1 along the channels.
        """
        levels = [lateral(level) for lateral, level in zip(self.lateral, pyramid[self.first :])]
        x = levels[-1]
        coarse = self.coarse(x)
        for level in reversed(levels[:-1]):
            x = level + F.interpolate(x, size=level.shape[2:], mode="nearest")
        return F.normalize(self.fine(x), dim=1), F.normalize(coarse, dim=1)


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
