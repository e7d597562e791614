"""How a stem learns which voxels are hidden: as an extra input channel of a convolution, or as a mask token.

Both turn the mask (B, 1, X, Y, Z) into what is added to the stem's output. They belong to the objective, not to the encoder, so that the
stem of an export is the stock one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class MaskToken(nn.Module):
    """A learned vector at hidden patches, for stems that cut an image into patches.

    The embedding of a zeroed patch is the stem's bias; with the token added it is a vector of its own, as a mask token that replaces the
    embedding would be. A patch of which only a part is hidden gets that part of the token.

    Args:
        channels: Width of the embedding.
        patch: Voxels per patch and axis.

    Reference:
        Xie et al. 2022 (SimMIM), section 3.2: learnable mask token vectors replace masked patches.
    """

    def __init__(self, channels: int, patch: Sequence[int]) -> None:
        super().__init__()
        self.patch = tuple(patch)
        self.mask_token = nn.Parameter(torch.zeros(1, channels, *[1] * len(self.patch)))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to the embeddings.

        Args:
            hidden: (B, 1, X, Y, Z), 1 = hidden, in the image's dtype.

        Returns:
            (B, channels, X / patch, Y / patch, Z / patch).
        """
        return functional.avg_pool3d(hidden, self.patch) * self.mask_token
