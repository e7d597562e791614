"""3D vision transformer: MONAI's own `ViT` inside, so that `UNETR.vit.load_state_dict(strict=True)` takes its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medssl.encoders.base import Encoder, freeze
from medssl.layers.mask_stem import MaskToken
from medssl.layers.pos_embed import resize_positions
from medssl.layers.tokens import flatten_tokens, gather_tokens, unflatten_tokens
from medssl.types import EncoderOutput


class ViT3D(Encoder):
    """MONAI ViT with a convolutional patch embedding and learned positions, token dropping, and hidden states as a pyramid.

    Args:
        in_channels: Image channels.
        image_size: Size (X, Y, Z) in voxels that the position table is made for; other sizes resize it on the fly.
        patch_size: Voxels per token and axis; one number stands for all axes. UNETR needs 16.
        hidden_size: Token width E.
        num_layers: Transformer blocks. UNETR needs 12.
        num_heads: Attention heads; must divide `hidden_size`.
        mlp_dim: Width of the MLP; None means 4 * hidden_size (MONAI's MaskedAutoEncoderViT defaults to 512, which does not transfer).

    Reference:
        Dosovitskiy et al. 2021; MONAI 1.6 `networks/nets/vit.py`.
    """

    name = "vit3d"
    library = "monai.ViT"
    drops_tokens = True
    marks_hidden = True
    key_groups = {"encoder": ["patch_embedding.", "blocks.", "norm."]}  # noqa: RUF012

    def __init__(
        self,
        *,
        in_channels: int = 1,
        image_size: Sequence[int] = (96, 96, 96),
        patch_size: int | Sequence[int] = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int | None = None,
    ) -> None:
        from monai.networks.nets import ViT

        patch = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
        size = tuple(image_size)
        super().__init__(
            in_channels=in_channels,
            image_size=list(size),
            patch_size=list(patch),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim or 4 * hidden_size,
        )
        self.patch_size = patch
        self.in_channels = in_channels
        self.embed_dim = hidden_size
        self.check_size(size)
        self.table_grid = tuple(n // p for n, p in zip(size, patch))
        self.net: Any = ViT(
            in_channels=in_channels,
            img_size=size,
            patch_size=patch,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim or 4 * hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            proj_type="conv",
            pos_embed_type="learnable",
            classification=False,
            spatial_dims=3,
        )
        for block in self.net.blocks:
            freeze(block.norm_cross_attn)  # in every MONAI block, used only with cross attention; DDP would wait for its gradient
            block.attn.use_flash_attention = True  # torch's fused attention: same parameters, same result up to rounding

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """The patch."""
        patch = args.get("patch_size", 16)
        return (patch,) * 3 if isinstance(patch, int) else tuple(patch)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.net.blocks)

    def mask_stem(self) -> nn.Module:
        """A mask token at hidden patches."""
        return MaskToken(self.embed_dim, self.patch_size)

    def forward_features(self, x: Tensor, keep: Tensor | None = None, stem_extra: Tensor | None = None) -> EncoderOutput:
        """Encode volumes; with `keep`, only those tokens enter the blocks (He et al. 2022, section 3).

        Args:
            x: (B, C, X, Y, Z).
            keep: (B, K) int64 token indices in the order of `flatten_tokens`.
            stem_extra: (B, E, *grid) added to the patch embedding, for instance a mask token.

        Returns:
            Tokens (B, N or K, E) after the final norm; `pyramid` holds the hidden state after every block as (B, E, *grid)
            maps when nothing was dropped.
        """
        self.check_size(x.shape[2:])
        embedding = self.net.patch_embedding
        maps = embedding.patch_embeddings(x)  # (B, E, *grid)
        if stem_extra is not None:
            maps = maps + stem_extra
        grid = tuple(maps.shape[2:])
        tokens = flatten_tokens(maps) + resize_positions(embedding.position_embeddings, self.table_grid, grid)
        tokens = embedding.dropout(tokens)
        if keep is not None:
            tokens = gather_tokens(tokens, keep)
        hidden = []
        for block in self.net.blocks:
            tokens = self.run(block, tokens)
            hidden.append(tokens)
        tokens = self.net.norm(tokens)
        pyramid = () if keep is not None else tuple(unflatten_tokens(state, grid) for state in hidden)
        return EncoderOutput(tokens=tokens, grid=grid, pooled=tokens.mean(dim=1), pyramid=pyramid)
