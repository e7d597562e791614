"""Masked autoencoder for a 3D ViT: hidden tokens never enter the encoder, a small decoder paints their voxels.

Reference:
    He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", section 3; Wald et al. 2025 (OpenMind benchmark) for 3D.
    Loss over hidden voxels only, optionally on per-patch normalised targets (He et al., section 3, "Reconstruction target").
    We differ in the loss's denominator: hidden and valid voxels of the whole step over all ranks, not a mean of means.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from medssl.layers.pos_embed import sincos_positions
from medssl.layers.tokens import flatten_tokens, patchify, scatter_tokens, unpatchify, visible_indices
from medssl.types import Part, StepContext, Views, ViewSpec


def normalise_patches(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise every patch by its own mean and variance: t = (x - mean) / sqrt(var + eps).

    Args:
        rows: (B, N, P) voxels of each patch.
        eps: Keeps flat patches finite.
    """
    mean = rows.mean(dim=-1, keepdim=True)
    variance = rows.var(dim=-1, unbiased=False, keepdim=True)
    return (rows - mean) / (variance + eps).sqrt()


def loss_weights(hidden: Tensor, valid: Tensor, region: str) -> Tensor:
    """Return the weight of each voxel in the loss.

    Args:
        hidden: (B, N) bool, True = hidden from the encoder.
        valid: (B, N, P) bool, False = padding or excluded from the loss (for instance a defaced region).
        region: `masked` scores hidden voxels only, `all` scores every valid voxel.

    Returns:
        (B, N, P) float32 of zeros and ones.
    """
    scored = valid & hidden[..., None] if region == "masked" else valid
    return scored.float()


class MAE(nn.Module):
    """MAE over an encoder that can drop tokens.

    Args:
        encoder: `vit3d` or another encoder whose `forward_features` takes `keep`.
        image_size: Size (X, Y, Z) of the view in voxels.
        spacing_mm: Spacing of the view; None keeps the item's own.
        view: Key of the view; its mask is `<view>_mask`, on the token grid.
        decoder_dim: Width of the decoder.
        decoder_depth: Transformer blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        norm_target: Normalise each patch of the target by its own mean and variance.
        recon_region: `masked` or `all`.
    """

    needs = ("drops_tokens",)

    def __init__(
        self,
        encoder: Any,
        *,
        image_size: tuple[int, ...],
        spacing_mm: tuple[float, ...] | None = None,
        view: str = "volume",
        decoder_dim: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        norm_target: bool = False,
        recon_region: Literal["masked", "all"] = "masked",
    ) -> None:
        super().__init__()
        if recon_region not in ("masked", "all"):
            raise ValueError(f'recon_region is "{recon_region}"; accepted: "masked" (hidden voxels only) or "all"')
        encoder.check_size(image_size)
        self.encoder = encoder
        self.view = view
        self.view_specs = {view: ViewSpec("volume", tuple(image_size), spacing_mm)}
        self.norm_target = norm_target
        self.recon_region = recon_region
        self.patch = tuple(encoder.patch_size)
        self.grid = tuple(n // p for n, p in zip(image_size, self.patch))
        voxels = encoder.in_channels * int(torch.tensor(self.patch).prod())
        self.embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.grid, decoder_dim), persistent=False)
        self.decoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                decoder_dim, decoder_heads, 4 * decoder_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_dim)
        self.head = nn.Linear(decoder_dim, voxels)

    def predict(self, x: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct every patch from the visible ones.

        Args:
            x: (B, C, X, Y, Z).
            mask: (B, *grid) bool, True = hidden, equal counts per sample.

        Returns:
            (B, N, C * prod(patch)) predicted voxels.
        """
        keep = visible_indices(mask)
        encoded = self.encoder.forward_features(x, keep=keep).tokens
        embedded = self.embed(encoded)
        fill = self.mask_token.to(embedded.dtype).expand(x.shape[0], self.positions.shape[1], -1)
        tokens = scatter_tokens(embedded, keep, fill) + self.positions
        for block in self.decoder:
            tokens = block(tokens)
        return self.head(self.norm(tokens))  # type: ignore[no-any-return]

    def _inputs(self, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (B*V, C, X, Y, Z), mask (B*V, *grid) and valid rows (B*V, N, P)."""
        x = views[self.view].flatten(0, 1)
        mask = views[f"{self.view}_mask"].flatten(0, 1)
        valid = views.meta.valid[self.view].flatten(0, 1)[:, None]
        valid_rows = patchify(valid.expand(-1, x.shape[1], *valid.shape[2:]), self.patch)
        return x, mask, valid_rows

    def denominators(self, views: Views) -> dict[str, Tensor]:
        """Return the number of scored voxels of a micro-batch."""
        _, mask, valid = self._inputs(views)
        return {"voxels": loss_weights(flatten_tokens(mask[:, None])[..., 0], valid, self.recon_region).sum()}

    def forward(self, views: Views, ctx: StepContext) -> dict[str, Tensor]:
        """Return `loss`, the squared error over scored voxels, and `mse_visible`, the same over visible ones (not trained on)."""
        x, mask, valid = self._inputs(views)
        prediction = self.predict(x, mask).float()
        target = patchify(x.float(), self.patch)
        if self.norm_target:
            target = normalise_patches(target)
        hidden = flatten_tokens(mask[:, None])[..., 0]
        weights = loss_weights(hidden, valid, self.recon_region)
        error = (prediction - target).square()
        loss = ctx.mean((error * weights).sum(), "voxels", weights.sum())
        visible = loss_weights(~hidden, valid, "masked")
        with torch.no_grad():
            mse_visible = (error * visible).sum() / visible.sum().clamp_min(1)
        return {"loss": loss, "mse_visible": mse_visible}

    @torch.no_grad()
    def reconstruct(self, views: Views) -> dict[str, Tensor]:
        """Return pictures for the report: `input`, `masked`, `output` (B*V, C, X, Y, Z) and `mask` (B*V, X, Y, Z).

        `output` shows the prediction at hidden patches and the input elsewhere; normalised targets are scaled back by the
        statistics of the true patch, as He et al. do for their figures.
        """
        x, mask, _ = self._inputs(views)
        rows = self.predict(x, mask).float()
        target = patchify(x.float(), self.patch)
        if self.norm_target:
            deviation = (target.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
            rows = rows * deviation + target.mean(dim=-1, keepdim=True)
        output = unpatchify(rows, self.grid, self.patch, x.shape[1])
        voxel_mask = unpatchify(flatten_tokens(mask[:, None]).expand(-1, -1, rows.shape[2] // x.shape[1]), self.grid, self.patch)
        blank = x.amin(dim=(1, 2, 3, 4), keepdim=True)
        return {
            "input": x,
            "masked": torch.where(voxel_mask, blank, x),
            "output": torch.where(voxel_mask, output, x.float()),
            "mask": voxel_mask[:, 0],
        }

    def exported(self) -> dict[str, Part]:
        """The encoder alone: the decoder of an MAE is thrown away."""
        return {"encoder": self.encoder.part("encoder")}
