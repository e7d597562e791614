"""Masked autoencoder for an encoder with a decoder of its own: hidden blocks are zeroed, that decoder paints them.

Reference:
    Wald et al. 2025, "Revisiting MAE pre-training for 3D medical image segmentation" (CVPR 2025), plain-MAE row of the ablation; Wald et
    al. 2025, OpenMind benchmark (ICCV 2025), loss over masked voxels, target not normalised per patch.
    Zero after z-score is the mean tissue, which a network cannot tell from a mask: the optional mask channel says so. Over a Swin it is
    a mask token, and this is SimMIM (Xie et al. 2022) with the network's own decoder in place of a linear one.
"""

from __future__ import annotations

from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medssl.types import Part, StepContext, Views, ViewSpec


def repeat_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Repeat a block mask up to voxels.

    Args:
        mask: (B, *grid) bool.
        size: Voxel size, a multiple of the grid on every axis.

    Returns:
        (B, 1, *size) bool.
    """
    for axis, (n, cells) in enumerate(zip(size, mask.shape[1:])):
        if n % cells:
            raise ValueError(f"a mask of {tuple(mask.shape[1:])} cells does not divide a view of {size} voxels")
        mask = mask.repeat_interleave(n // cells, dim=axis + 1)
    return mask[:, None]


class MAECNN(nn.Module):
    """MAE over an encoder with a decoder of its own (`segresnet3d`, `swin3d`, `resenc3d`).

    Args:
        encoder: Has `forward_features(x, stem_extra=...)`, `mask_stem()` and `forward_decoder(pyramid, image)`.
        image_size: Size (X, Y, Z) of the view in voxels.
        spacing_mm: Spacing of the view; None keeps the item's own.
        view: Key of the view; its mask is `<view>_mask`.
        mask_channel: Tell the stem which voxels are hidden: an extra channel of the first convolution, or a mask token (`swin3d`). It is a
            module of this objective and stays out of the export.
        recon_region: `masked` scores hidden voxels only, `all` scores every valid voxel.
    """

    needs = ("has_decoder",)

    def __init__(
        self,
        encoder: Any,
        *,
        image_size: tuple[int, ...],
        spacing_mm: tuple[float, ...] | None = None,
        view: str = "volume",
        mask_channel: bool = True,
        recon_region: Literal["masked", "all"] = "masked",
    ) -> None:
        super().__init__()
        if recon_region not in ("masked", "all"):
            raise ValueError(f'recon_region is "{recon_region}"; accepted: "masked" (hidden voxels only) or "all"')
        encoder.check_decoder(image_size)
        self.encoder = encoder
        self.view = view
        self.view_specs = {view: ViewSpec("volume", tuple(image_size), spacing_mm)}
        self.recon_region = recon_region
        filters = encoder.init_filters
        self.mask_stem = encoder.mask_stem() if mask_channel else None
        self.head = nn.Sequential(nn.GroupNorm(gcd(8, filters), filters), nn.ReLU(), nn.Conv3d(filters, encoder.in_channels, 1))

    def predict(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruct a volume.

        Args:
            x: (B, C, X, Y, Z).
            hidden: (B, 1, X, Y, Z) bool, True = hidden.

        Returns:
            (B, C, X, Y, Z).
        """
        extra = self.mask_stem(hidden.to(x.dtype)) if self.mask_stem is not None else None
        shown = x.masked_fill(hidden, 0.0)
        pyramid = self.encoder.forward_features(shown, stem_extra=extra).pyramid
        return self.head(self.encoder.forward_decoder(pyramid, shown))  # type: ignore[no-any-return]

    def _inputs(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (B*V, C, X, Y, Z), hidden and valid (B*V, 1, X, Y, Z)."""
        x = views[self.view].flatten(0, 1)
        hidden = repeat_mask(views[f"{self.view}_mask"].flatten(0, 1), tuple(x.shape[2:]))
        return x, hidden, views.meta.valid[self.view].flatten(0, 1)[:, None]

    def _weights(self, hidden: Tensor, valid: Tensor, channels: int) -> Tensor:
        scored = valid & hidden if self.recon_region == "masked" else valid
        return scored.float().expand(-1, channels, *hidden.shape[2:])

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the number of scored voxels of a micro-batch."""
        x, hidden, valid = self._inputs(views)
        return {"voxels": self._weights(hidden, valid, x.shape[1]).sum()}

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the squared error over scored voxels, and `mse_visible`, the same over visible ones (not trained on)."""
        x, hidden, valid = self._inputs(views)
        error = (self.predict(x, hidden).float() - x.float()).square()
        weights = self._weights(hidden, valid, x.shape[1])
        loss = ctx.mean((error * weights).sum(), "voxels", weights.sum())
        visible = (valid & ~hidden).float()
        with torch.no_grad():
            mse_visible = (error * visible).sum() / visible.sum().clamp_min(1)
        return {"loss": loss, "mse_visible": mse_visible}

    @torch.no_grad()
    def reconstruct(self, views: Views) -> dict[str, Tensor]:
        """Return pictures for the report: `input`, `masked`, `output` (B*V, C, X, Y, Z) and `mask` (B*V, X, Y, Z)."""
        x, hidden, _ = self._inputs(views)
        output = self.predict(x, hidden).float()
        blank = x.amin(dim=(1, 2, 3, 4), keepdim=True)
        return {
            "input": x,
            "masked": torch.where(hidden, blank, x),
            "output": torch.where(hidden, output, x.float()),
            "mask": hidden[:, 0],
        }

    def exported(self) -> dict[str, Part]:
        """The encoder, and the network's decoder as a part of its own (fine-tuning may take it along; exports do not)."""
        return {"encoder": self.encoder.part("encoder"), "decoder": self.encoder.part("decoder")}
