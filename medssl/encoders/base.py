"""What every encoder is: a thin module around one stock network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medssl.layers.tokens import TOKEN_ORDER
from medssl.types import EncoderOutput, Part


class Encoder(nn.Module):
    """Thin wrapper with one child `net`, the stock module itself, so that `net.state_dict()` is the export.

    A subclass sets `net` and the class attributes, walks `net` in `forward_features`, and lists in `blocks` the units to shard, compile
    and checkpoint. Parameters that no path uses get `requires_grad = False` in the constructor.

    Attributes:
        name: Registered name.
        library: The stock class, for the manifest.
        axis_order: What the axes of its images are, for the manifest.
        key_groups: `encoder` and, where the stock module has one, `decoder`: prefixes of state-dict keys.
        patch_size: Voxels per token and axis.
        embed_dim: E, the width of `tokens` and `pooled`.
        drops_tokens: `forward_features` takes `keep`.
        marks_hidden: `forward_features` takes `stem_extra`, which the module that `mask_stem()` returns makes of a mask.
        has_decoder: `marks_hidden`, and there are `decode(pyramid, image)`, which yields the decoder's maps from coarse to fine,
            `forward_decoder(pyramid, image)`, the last of them with `init_filters` channels, and `context_dim`, the channels of the first.
        pyramid_centres: Where a cell of the pyramid is centred in the voxels it stands for: on the `first` one along each axis
            (strided convolutions of odd size) or in the `middle` (patches); empty where there is no pyramid of several scales.
        normalised_maps: Maps of the pyramid end in a norm, or in sums of few such; otherwise whoever reads them normalises them first, as the
            network's own next block does.
        takes_images: `forward_features` takes flat images (B, C, H, W), and its tokens are the cells of a feature map.
        takes_clips: Images are clips (B, C, T, H, W), with `valid`; it has `masked(x, keep, valid)` and `frame_branch()`.
        takes_stacks: It has `embed_slices(stacks, valid)`, `aggregator(tokens, valid, z_mm)` and `parts()`.
    """

    name: str = ""
    library: str = ""
    axis_order: str = "XYZ-RAS"
    drops_tokens: bool = False
    marks_hidden: bool = False
    has_decoder: bool = False
    pyramid_centres: str = ""
    normalised_maps: bool = True
    takes_images: bool = False
    takes_clips: bool = False
    takes_stacks: bool = False
    key_groups: dict[str, list[str]] = {}  # noqa: RUF012 (overridden as a constant)
    net: nn.Module
    patch_size: tuple[int, ...]
    embed_dim: int
    in_channels: int

    def __init__(self, **args: Any) -> None:
        super().__init__()
        self._args = args
        self.checkpoint_blocks = False

    def config(self) -> dict[str, Any]:
        """Return `{"name", "args"}`: enough to build the same encoder again."""
        return {"name": self.name, "args": dict(self._args)}

    @classmethod
    def divisor(cls, args: Mapping[str, Any]) -> tuple[int, ...]:
        """Return what every image size must be a multiple of, for constructor arguments `args`, without building the network."""
        raise NotImplementedError

    def part(self, group: str) -> Part:
        """Describe one key group (`encoder`, `decoder`) for the run's `weights/` folder."""
        manifest = {
            "encoder": self.config(),
            "library": self.library,
            "key_groups": self.key_groups,
            "channels": self.in_channels,
            "patch_size": list(self.patch_size),
            "axis_order": self.axis_order,
            "token_order": TOKEN_ORDER,
        }
        return Part(module=self, manifest=manifest, keys=tuple(self.key_groups[group]))

    def mask_stem(self) -> nn.Module:
        """Return a new module that makes `stem_extra` of a mask (B, 1, *size); it belongs to the objective."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """Units to shard, compile and checkpoint, in order."""
        raise NotImplementedError

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> EncoderOutput:
        """Encode images.

        Args:
            x: (B, C, *size), every size a multiple of `patch_size`.
            keep: (B, K) int64 indices of the tokens to encode; None encodes all.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> EncoderOutput:
        """Encode whole images."""
        return self.forward_features(x)

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Run one block, recomputing it in the backward pass when activation checkpointing is on."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]

    def check_size(self, size: Iterable[int]) -> None:
        """Raise unless every size is a positive multiple of the patch."""
        size = tuple(size)
        if any(n % p or n < p for n, p in zip(size, self.patch_size)):
            raise ValueError(
                f"{self.name}: image size {size} is not a multiple of the patch {self.patch_size}; crop or pad the image"
            )

    def check_decoder(self, size: Iterable[int]) -> None:
        """Raise unless images of this size can be decoded in training, too."""
        self.check_size(size)


def freeze(module: nn.Module) -> None:
    """Set requires_grad False on parameters that no path uses."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
