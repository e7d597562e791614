"""3D SegResNet: MONAI's own network inside, encoder and decoder, without its last convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medssl.encoders.base import Encoder, freeze
from medssl.layers.tokens import flatten_tokens
from medssl.types import EncoderOutput


class SegResNet3D(Encoder):
    """MONAI SegResNet. Its encoder is exported; its decoder is a part of its own that fine-tuning may take along.

    Args:
        in_channels: Image channels.
        init_filters: Filters of the first convolution; a multiple of 8 (group norm).
        blocks_down: Residual blocks per scale.
        blocks_up: Residual blocks per decoder scale; one entry less than `blocks_down`.

    Reference:
        Myronenko 2018, "3D MRI brain tumor segmentation using autoencoder regularization"; MONAI 1.6 `networks/nets/segresnet.py`.
    """

    name = "segresnet3d"
    library = "monai.SegResNet"
    has_decoder = True
    marks_hidden = True
    pyramid_centres = "first"
    normalised_maps = False
    key_groups = {"encoder": ["convInit.", "down_layers."], "decoder": ["up_samples.", "up_layers."]}  # noqa: RUF012

    def __init__(
        self,
        *,
        in_channels: int = 1,
        init_filters: int = 16,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
    ) -> None:
        from monai.networks.nets import SegResNet

        super().__init__(
            in_channels=in_channels,
            init_filters=init_filters,
            blocks_down=list(blocks_down),
            blocks_up=list(blocks_up),
        )
        self.net: Any = SegResNet(
            spatial_dims=3,
            init_filters=init_filters,
            in_channels=in_channels,
            out_channels=1,
            blocks_down=tuple(blocks_down),
            blocks_up=tuple(blocks_up),
            use_conv_final=False,
        )
        freeze(self.net.conv_final)  # MONAI builds it even when it is not used
        self.in_channels = in_channels
        self.init_filters = init_filters
        self.context_dim = init_filters * 2 ** max(len(blocks_down) - 2, 0)
        self.patch_size = (2 ** (len(blocks_down) - 1),) * 3
        self.embed_dim = init_filters * 2 ** (len(blocks_down) - 1)

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """Two to the number of times the network halves the image."""
        return (2 ** (len(args.get("blocks_down", (1, 2, 2, 4))) - 1),) * 3

    @property
    def blocks(self) -> list[nn.Module]:
        """The scales of the encoder, then those of the decoder."""
        return [*self.net.down_layers, *self.net.up_layers]

    def mask_stem(self) -> nn.Module:
        """The share of an extra input channel, the mask, in the first convolution."""
        return nn.Conv3d(1, self.init_filters, 3, padding=1, bias=False)

    def forward_features(self, x: Tensor, keep: Tensor | None = None, stem_extra: Tensor | None = None) -> EncoderOutput:
        """Encode volumes.

        Args:
            x: (B, C, X, Y, Z), sizes multiples of `patch_size`.
            keep: Not supported: a convolution cannot drop tokens.
            stem_extra: (B, init_filters, X, Y, Z) added to the output of the first convolution, for instance a mask channel's
                share during pretraining, which then needs no surgery at export.

        Returns:
            Tokens of the coarsest scale (B, N, E), and the outputs of all scales, fine to coarse, as `pyramid`.
        """
        if keep is not None:
            raise ValueError("segresnet3d cannot drop tokens: zero the hidden blocks in the image instead (objective mae_cnn)")
        self.check_size(x.shape[2:])
        x = self.net.convInit(x)
        if stem_extra is not None:
            x = x + stem_extra
        pyramid = []
        for down in self.net.down_layers:
            x = self.run(down, x)
            pyramid.append(x)
        tokens = flatten_tokens(x)
        return EncoderOutput(tokens=tokens, grid=tuple(x.shape[2:]), pooled=tokens.mean(dim=1), pyramid=tuple(pyramid))

    def decode(self, pyramid: Sequence[Tensor], image: Tensor | None = None) -> Iterator[Tensor]:
        """Walk the decoder and yield its maps from coarse to fine; what is not asked for is not computed.

        Args:
            pyramid: Maps fine to coarse, as `forward_features` returns them.
            image: Not used: this decoder has no skip connection from the image.
        """
        x = pyramid[-1]
        for up_sample, up_layer, skip in zip(self.net.up_samples, self.net.up_layers, reversed(pyramid[:-1])):
            x = self.run(up_layer, up_sample(x) + skip)
            yield x

    def forward_decoder(self, pyramid: Sequence[Tensor], image: Tensor | None = None) -> Tensor:
        """Return the decoder's finest map (B, init_filters, X, Y, Z), before MONAI's last norm, activation and 1x1 convolution."""
        x = pyramid[-1]
        for x in self.decode(pyramid, image):  # noqa: B007
            pass
        return x
