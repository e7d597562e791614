"""3D Swin transformer: MONAI's own `SwinUNETR` inside, encoder and decoder, without its last convolution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from medssl.encoders.base import Encoder, freeze
from medssl.errors import RequestError
from medssl.layers.mask_stem import MaskToken
from medssl.layers.tokens import flatten_tokens
from medssl.types import EncoderOutput

STEM = 2  # voxels per token of the first stage, fixed by MONAI's decoder
STRIDE = 32
DECODER = ("encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10.", *(f"decoder{n}." for n in range(1, 6)))


class Swin3D(Encoder):
    """MONAI SwinUNETR. Its `swinViT` is exported; the convolutions around it are a part of their own that fine-tuning may take along.

    Args:
        in_channels: Image channels.
        feature_size: Width of the first stage, a multiple of 12; 24 and 48 are usual, 12 is for tests.
        depths: Blocks of each of the four stages.
        num_heads: Attention heads of each stage; must divide its width, feature_size times 1, 2, 4, 8.
        window_size: Tokens per window and axis.
        drop_path: Largest rate of stochastic depth.

    Reference:
        Hatamizadeh et al. 2022, "Swin UNETR" (arXiv 2201.01266); MONAI 1.6 `networks/nets/swin_unetr.py`.
    """

    name = "swin3d"
    library = "monai.SwinUNETR"
    has_decoder = True
    marks_hidden = True
    pyramid_centres = "middle"
    key_groups = {"encoder": ["swinViT."], "decoder": list(DECODER)}  # noqa: RUF012

    def __init__(
        self,
        *,
        in_channels: int = 1,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        drop_path: float = 0.0,
    ) -> None:
        from monai.networks.nets import SwinUNETR

        _check(feature_size, depths, num_heads)
        window = (window_size,) * 3 if isinstance(window_size, int) else tuple(window_size)
        super().__init__(
            in_channels=in_channels,
            feature_size=feature_size,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=list(window),
            drop_path=drop_path,
        )
        self.net: Any = SwinUNETR(
            in_channels=in_channels,
            out_channels=1,
            feature_size=feature_size,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window,
            dropout_path_rate=drop_path,
            spatial_dims=3,
        )
        freeze(self.net.out)  # the head of a task
        self.in_channels = in_channels
        self.init_filters = feature_size
        self.context_dim = 8 * feature_size
        self.patch_size = (STRIDE,) * 3
        self.embed_dim = 16 * feature_size

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """The patch of 2 voxels, halved four times."""
        return (STRIDE,) * 3

    @property
    def blocks(self) -> list[nn.Module]:
        """The four stages, then the blocks of the decoder from coarse to fine."""
        net = self.net
        skips = [net.encoder10, net.encoder4, net.encoder3, net.encoder2, net.encoder1]
        return [*self._stages(), *skips, net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1]

    def _stages(self) -> list[nn.Module]:
        swin = self.net.swinViT
        return [stage[0] for stage in (swin.layers1, swin.layers2, swin.layers3, swin.layers4)]

    def mask_stem(self) -> nn.Module:
        """A mask token at hidden patches of 2 voxels."""
        return MaskToken(self.init_filters, (STEM,) * 3)

    def forward_features(self, x: Tensor, keep: Tensor | None = None, stem_extra: Tensor | None = None) -> EncoderOutput:
        """Encode volumes.

        Args:
            x: (B, C, X, Y, Z), sizes multiples of 32.
            keep: Not supported: windows need all tokens.
            stem_extra: (B, feature_size, X / 2, Y / 2, Z / 2) added to the patch embedding, for instance a mask token.

        Returns:
            Tokens of the coarsest scale (B, N, 16 * feature_size); `pyramid` holds the five hidden states that SwinUNETR's decoder sees,
            strides 2 to 32, layer-normalised as there.
        """
        if keep is not None:
            raise ValueError("swin3d cannot drop tokens: hide blocks in the image instead (objective mae_cnn)")
        self.check_size(x.shape[2:])
        swin = self.net.swinViT
        x = swin.patch_embed(x)
        if stem_extra is not None:
            x = x + stem_extra
        x = swin.pos_drop(x)
        pyramid = [swin.proj_out(x, self.net.normalize)]
        for stage in self._stages():
            x = self.run(stage, x.contiguous())
            pyramid.append(swin.proj_out(x, self.net.normalize))
        tokens = flatten_tokens(pyramid[-1])
        return EncoderOutput(tokens=tokens, grid=tuple(x.shape[2:]), pooled=tokens.mean(dim=1), pyramid=tuple(pyramid))

    def check_decoder(self, size: Iterable[int]) -> None:
        """Raise unless more than one cell is left at the coarsest stride, for the decoder's instance norm needs two."""
        size = tuple(size)
        self.check_size(size)
        if prod(n // STRIDE for n in size) == 1:
            raise ValueError(
                f"swin3d: images of {size} voxels have one cell at stride {STRIDE}, over which the decoder's instance norm is "
                f"undefined; use {2 * STRIDE} voxels or more along an axis"
            )

    def decode(self, pyramid: Sequence[Tensor], image: Tensor | None = None) -> Iterator[Tensor]:
        """Walk the decoder and yield its maps from stride 16 to 1; what is not asked for is not computed.

        Args:
            pyramid: Hidden states as `forward_features` returns them.
            image: (B, C, X, Y, Z) that was encoded; the finest map is made of it too.
        """
        if image is None:
            raise ValueError("swin3d: the decoder has a skip connection from the image; give the image that was encoded")
        if self.training:
            self.check_decoder(image.shape[2:])
        net = self.net
        x = self.run(net.decoder5, self.run(net.encoder10, pyramid[4]), pyramid[3])
        yield x
        finer = [(net.decoder4, net.encoder4, pyramid[2]), (net.decoder3, net.encoder3, pyramid[1])]
        for up, skip, level in [*finer, (net.decoder2, net.encoder2, pyramid[0]), (net.decoder1, net.encoder1, image)]:
            x = self.run(up, x, self.run(skip, level))
            yield x

    def forward_decoder(self, pyramid: Sequence[Tensor], image: Tensor | None = None) -> Tensor:
        """Return the decoder's finest map (B, feature_size, X, Y, Z), before the last convolution; see `decode`."""
        *_, finest = self.decode(pyramid, image)
        return finest


def _check(feature_size: int, depths: Sequence[int], num_heads: Sequence[int]) -> None:
    """Refuse what MONAI accepts or fails on without saying which argument is meant."""
    if feature_size < 12 or feature_size % 12:
        raise RequestError(f"swin3d.feature_size is {feature_size}; accepted: multiples of 12, for instance 24 or 48")
    if len(depths) != 4 or len(num_heads) != 4 or min(*depths, *num_heads) < 1:
        raise RequestError(
            f"swin3d has four stages; found depths {list(depths)} and num_heads {list(num_heads)}; give four numbers above 0 for each"
        )
    for stage, heads in enumerate(num_heads):
        width = feature_size * 2**stage
        if width % heads:
            raise RequestError(f"swin3d.num_heads: {heads} heads do not divide the width {width} of stage {stage + 1}")
