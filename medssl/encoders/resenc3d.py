"""3D residual-encoder U-Net of nnU-Net's presets, our own modules under nnU-Net's names, encoder and decoder, without its last convolutions.

nnU-Net's own modules register every convolution and norm twice (`conv` and `all_modules.0`, `norm` and `all_modules.1`), and the whole
encoder again below the decoder (`decoder.encoder.*`). The second names hold the same tensors, so they are not kept here: `with_aliases` adds
them for an export, `without_aliases` takes them away at an import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from medssl.encoders.base import Encoder
from medssl.errors import RequestError, WeightsError
from medssl.layers.tokens import flatten_tokens
from medssl.types import EncoderOutput

SLOPE = 1e-2  # of the leaky ReLU
STEM_CONVOLUTION = "encoder.stem.convs.0.conv.weight"
LIBRARY = "dynamic_network_architectures.ResidualEncoderUNet"

Triple = tuple[int, int, int]


def _half(kernel: Triple) -> Triple:
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2


class ConvNorm(nn.Module):
    """Convolution, affine instance norm and, unless it ends a residual branch, leaky ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Triple, stride: Triple, *, bias: bool = True, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=_half(kernel), bias=bias)
        self.norm = nn.InstanceNorm3d(outputs, eps=1e-5, affine=True)
        self.active = active

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Apply; `extra` is added to the output of the convolution."""
        x = self.conv(x)
        x = self.norm(x if extra is None else x + extra)
        return nn.functional.leaky_relu(x, SLOPE, inplace=True) if self.active else x


class ConvStack(nn.Module):
    """Several `ConvNorm` of one width."""

    def __init__(self, count: int, inputs: int, outputs: int, kernel: Triple) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * count
        self.convs = nn.Sequential(*(ConvNorm(a, b, kernel, (1, 1, 1)) for a, b in zip(widths, widths[1:])))

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return self.convs(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; where the block halves the image, the shortcut averages and then projects (ResNet-D)."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, kernel, stride)
        self.conv2 = ConvNorm(outputs, outputs, kernel, (1, 1, 1), active=False)
        pool = [nn.AvgPool3d(stride, stride)] if max(stride) > 1 else []
        project = [ConvNorm(inputs, outputs, (1, 1, 1), (1, 1, 1), bias=False, active=False)] if inputs != outputs else []
        self.skip = nn.Sequential(*pool, *project)

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x), SLOPE, inplace=True)


class ResidualStage(nn.Module):
    """Residual blocks of one scale; the first one halves."""

    def __init__(self, count: int, inputs: int, outputs: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        first = ResidualBlock(inputs, outputs, kernel, stride)
        self.blocks = nn.Sequential(first, *(ResidualBlock(outputs, outputs, kernel, (1, 1, 1)) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply."""
        return self.blocks(x)  # type: ignore[no-any-return]


class ResidualEncoder(nn.Module):
    """Stem at full size, then one stage per scale."""

    def __init__(
        self, in_channels: int, features: Sequence[int], blocks: Sequence[int], kernels: Sequence[Triple], strides: Sequence[Triple]
    ) -> None:
        super().__init__()
        self.stem = ConvStack(1, in_channels, features[0], kernels[0])
        widths = [features[0], *features]
        parts = zip(blocks, widths, features, kernels, strides, strict=False)
        self.stages = nn.Sequential(*(ResidualStage(*part) for part in parts))


class UNetDecoder(nn.Module):
    """Transposed convolutions, joined with the skips, coarse to fine; `seg_layers` end every scale of a segmentation network."""

    def __init__(
        self,
        features: Sequence[int],
        convolutions: Sequence[int],
        kernels: Sequence[Triple],
        strides: Sequence[Triple],
        out_channels: int | None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.transpconvs = nn.ModuleList()
        if out_channels is not None:
            self.seg_layers = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in reversed(features[:-1]))
        for count, level in zip(convolutions, range(len(features) - 2, -1, -1), strict=True):
            self.transpconvs.append(
                nn.ConvTranspose3d(features[level + 1], features[level], strides[level + 1], strides[level + 1])
            )
            self.stages.append(ConvStack(count, 2 * features[level], features[level], kernels[level]))


class ResidualEncoderUNet(nn.Module):
    """nnU-Net's residual-encoder U-Net in three dimensions: instance norm, leaky ReLU, biased convolutions.

    Args:
        in_channels: Image channels.
        features_per_stage: Channels of each scale, fine to coarse.
        n_blocks_per_stage: Residual blocks of each scale.
        n_conv_per_stage_decoder: Convolutions of each scale of the decoder, coarse to fine.
        kernel_sizes: Kernel of each scale.
        strides: Stride of the first block of each scale; all ones for the first scale.
        out_channels: Classes; None builds no last convolutions, and `forward` returns the decoder's finest map.

    Reference:
        Isensee et al. 2024, "nnU-Net Revisited" (arXiv 2404.09556), presets ResEnc M, L, XL; He et al. 2019, "Bag of Tricks", ResNet-D
        shortcut; start weights as there (He et al. 2015, last norm of a block at zero).
    """

    def __init__(
        self,
        in_channels: int,
        features_per_stage: Sequence[int],
        n_blocks_per_stage: Sequence[int],
        n_conv_per_stage_decoder: Sequence[int],
        kernel_sizes: Sequence[Triple],
        strides: Sequence[Triple],
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = ResidualEncoder(in_channels, features_per_stage, n_blocks_per_stage, kernel_sizes, strides)
        self.decoder = UNetDecoder(features_per_stage, n_conv_per_stage_decoder, kernel_sizes, strides, out_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.norm.weight)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the maps of all scales, fine to coarse."""
        x, maps = self.encoder.stem(x), []
        for stage in self.encoder.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores (B, out_channels, X, Y, Z), or the finest map where there are no classes."""
        *skips, x = self.encode(x)
        for up, stage, skip in zip(self.decoder.transpconvs, self.decoder.stages, reversed(skips), strict=True):
            x = stage(torch.cat([up(x), skip], dim=1))
        return self.decoder.seg_layers[-1](x) if hasattr(self.decoder, "seg_layers") else x


class ResEnc3D(Encoder):
    """nnU-Net's residual-encoder U-Net. Its encoder is exported; its decoder is a part of its own that fine-tuning may take along.

    Args:
        in_channels: Image channels.
        features_per_stage: Channels of each scale, fine to coarse. The default is preset L.
        n_blocks_per_stage: Residual blocks of each scale.
        n_conv_per_stage_decoder: Convolutions of each scale of the decoder, coarse to fine: one entry less; one number stands for all.
        kernel_sizes: One number, or per scale a number or three (X, Y, Z), odd.
        strides: Per scale a number or three (X, Y, Z), the first one 1.

    Reference:
        Isensee et al. 2024, "nnU-Net Revisited" (arXiv 2404.09556), presets ResEnc M, L, XL.
    """

    name = "resenc3d"
    library = LIBRARY
    has_decoder = True
    marks_hidden = True
    # the shortcuts average each cell over its own voxels; the strided convolution beside them is centred half a voxel lower
    pyramid_centres = "middle"
    key_groups = {"encoder": ["encoder."], "decoder": ["decoder."]}  # noqa: RUF012

    def __init__(
        self,
        *,
        in_channels: int = 1,
        features_per_stage: Sequence[int] = (32, 64, 128, 256, 320, 320),
        n_blocks_per_stage: Sequence[int] = (1, 3, 4, 6, 6, 6),
        n_conv_per_stage_decoder: int | Sequence[int] = 1,
        kernel_sizes: int | Sequence[int | Sequence[int]] = 3,
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2, 2, 2),
    ) -> None:
        given = {
            "in_channels": in_channels,
            "features_per_stage": features_per_stage,
            "n_blocks_per_stage": n_blocks_per_stage,
            "n_conv_per_stage_decoder": n_conv_per_stage_decoder,
            "kernel_sizes": kernel_sizes,
            "strides": strides,
        }
        args = complete(given)
        super().__init__(**args)
        self.net: Any = build_network(args)
        self.in_channels = in_channels
        self.init_filters = args["features_per_stage"][0]
        self.context_dim = args["features_per_stage"][-2]
        self.embed_dim = args["features_per_stage"][-1]
        self.patch_size = self.divisor(args)

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """The product of all strides."""
        return tuple(prod(axis) for axis in zip(*complete(args)["strides"]))

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, then the steps of the decoder from coarse to fine."""
        net = self.net
        residual = [block for stage in net.encoder.stages for block in stage.blocks]
        return [*residual, *(part for pair in zip(net.decoder.transpconvs, net.decoder.stages) for part in pair)]

    def check_size(self, size: Iterable[int]) -> None:
        """Raise unless every size is a multiple of the patch and more than one cell is left, for instance norm needs two."""
        size = tuple(size)
        super().check_size(size)
        if prod(n // p for n, p in zip(size, self.patch_size)) == 1:
            raise ValueError(
                f"resenc3d: images of {size} voxels have one cell at stride {self.patch_size}, over which instance norm is undefined; "
                f"use {2 * self.patch_size[0]} voxels or more along an axis"
            )

    def mask_stem(self) -> nn.Module:
        """The share of an extra input channel, the mask, in the first convolution."""
        kernel = tuple(self._args["kernel_sizes"][0])
        return nn.Conv3d(1, self.init_filters, kernel, padding=_half(kernel), bias=False)

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
            raise ValueError("resenc3d cannot drop tokens: zero the hidden blocks in the image instead (objective mae_cnn)")
        self.check_size(x.shape[2:])
        x = self.net.encoder.stem.convs[0](x, stem_extra)
        pyramid = []
        for stage in self.net.encoder.stages:
            for block in stage.blocks:
                x = self.run(block, x)
            pyramid.append(x)
        tokens = flatten_tokens(x)
        return EncoderOutput(tokens=tokens, grid=tuple(x.shape[2:]), pooled=tokens.mean(dim=1), pyramid=tuple(pyramid))

    def decode(self, pyramid: Sequence[Tensor], image: Tensor | None = None) -> Iterator[Tensor]:
        """Walk the decoder and yield its maps from coarse to fine; what is not asked for is not computed.

        Args:
            pyramid: Maps fine to coarse, as `forward_features` returns them.
            image: Not used: this decoder has no skip connection from the image.
        """
        x, decoder = pyramid[-1], self.net.decoder
        for up, stage, skip in zip(decoder.transpconvs, decoder.stages, reversed(pyramid[:-1])):
            x = self.run(stage, torch.cat([self.run(up, x), skip], dim=1))
            yield x

    def forward_decoder(self, pyramid: Sequence[Tensor], image: Tensor | None = None) -> Tensor:
        """Return the decoder's finest map (B, init_filters, X, Y, Z), before the last convolution of a segmentation network."""
        *_, finest = self.decode(pyramid, image)
        return finest


def complete(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `ResEnc3D` with defaults filled in and every stage spelt out, as plain lists.

    Raises:
        RequestError: They do not go together.
    """
    features = [int(n) for n in args.get("features_per_stage", (32, 64, 128, 256, 320, 320))]
    blocks = [int(n) for n in args.get("n_blocks_per_stage", (1, 3, 4, 6, 6, 6))]
    convolutions = args.get("n_conv_per_stage_decoder", 1)
    convolutions = [convolutions] * (len(features) - 1) if isinstance(convolutions, int) else [int(n) for n in convolutions]
    kernels = args.get("kernel_sizes", 3)
    kernels = [_triple(k) for k in ([kernels] * len(features) if isinstance(kernels, int) else kernels)]
    strides = [_triple(s) for s in args.get("strides", (1, 2, 2, 2, 2, 2))]
    stages = len(features)
    faults = [
        f"{name} has {len(values)} entries, expected {expected}"
        for name, values, expected in (
            ("n_blocks_per_stage", blocks, stages),
            ("n_conv_per_stage_decoder", convolutions, stages - 1),
            ("kernel_sizes", kernels, stages),
            ("strides", strides, stages),
        )
        if len(values) != expected
    ]
    if stages < 2:
        faults = [f"features_per_stage has {stages} entries, expected two or more"]
    if any(k % 2 == 0 or k < 1 for kernel in kernels for k in kernel):
        faults.append(f"kernel_sizes are {kernels}, expected odd numbers")
    if strides and max(strides[0]) > 1:
        faults.append(f"the first stride is {strides[0]}, expected 1: the decoder ends at the size of the image")
    if min([*features, *blocks, *convolutions, *(s for stride in strides for s in stride)], default=0) < 1:
        faults.append("numbers below 1")
    if faults:
        raise RequestError(f"resenc3d: {'; '.join(faults)}; every stage has one entry each (the decoder one less)")
    return {
        "in_channels": int(args.get("in_channels", 1)),
        "features_per_stage": features,
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": convolutions,
        "kernel_sizes": kernels,
        "strides": strides,
    }


def _triple(value: int | Sequence[int]) -> list[int]:
    found = [value] * 3 if isinstance(value, int) else [int(n) for n in value]
    if len(found) != 3:
        raise RequestError(f"resenc3d: {found} is a kernel or stride of {len(found)} axes; give one number, or three (X, Y, Z)")
    return found


def build_network(args: Mapping[str, Any], out_channels: int | None = None) -> ResidualEncoderUNet:
    """Build the network of a `ResEnc3D`'s arguments, with last convolutions where classes are given."""
    full = complete(args)
    for name in ("kernel_sizes", "strides"):
        full[name] = [tuple(value) for value in full[name]]
    return ResidualEncoderUNet(**full, out_channels=out_channels)


_OWN = re.compile(r"^(.*\.(?:convs\.\d+|conv1|conv2|skip\.\d+)\.)(conv|norm)\.(weight|bias)$")
_ALIAS = re.compile(r"^(.*\.)all_modules\.([01])\.(weight|bias)$")
_PLACES = {"conv": "0", "norm": "1"}
_NAMES = {"0": "conv", "1": "norm"}


def with_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under every name that nnU-Net's own network has for them; equal tensors share their storage.

    The encoder is repeated below `decoder.encoder.` where there is a decoder.

    Args:
        state: Tensors under the names of `ResidualEncoderUNet` here.
    """
    named = dict(state)
    for key, tensor in state.items():
        if found := _OWN.match(key):
            named[f"{found[1]}all_modules.{_PLACES[found[2]]}.{found[3]}"] = tensor
    if any(key.startswith("decoder.") for key in state):
        named |= {f"decoder.{key}": tensor for key, tensor in named.items() if key.startswith("encoder.")}
    return named


def without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor under one name; inverse of `with_aliases`.

    Raises:
        WeightsError: Two names of one tensor hold different numbers.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        own = key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key
        if found := _ALIAS.match(own):
            own = f"{found[1]}{_NAMES[found[2]]}.{found[3]}"
        if own in named and not torch.equal(named[own], tensor):
            raise WeightsError(
                f"{own} has two names in the file (one of nnU-Net's aliases) and not the same numbers under both: the file was changed "
                "or is damaged; copy it again"
            )
        named.setdefault(own, tensor)
    return named


def reverse_axes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the three axes of every kernel reversed: from X, Y, Z as here to Z, Y, X as nnU-Net reads images, and back."""
    return {key: value.permute(0, 1, 4, 3, 2).contiguous() if value.ndim == 5 else value for key, value in state.items()}


def reverse_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `ResEnc3D` for images with reversed axes."""
    full = complete(args)
    return {**full, **{name: [value[::-1] for value in full[name]] for name in ("kernel_sizes", "strides")}}
