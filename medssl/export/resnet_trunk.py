"""A timm ResNet in the ResNets of torchvision and MONAI: the same names, so what is left is channels, depth and the check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medssl.encoders.stem import adapt_stem
from medssl.errors import RequestError, WeightsError
from medssl.export.manifest import INFLATED_ORDER, Weights, exported_manifest
from medssl.export.slices import Adaptation, grey_or_random, inflate, slice_encoder_of
from medssl.export.verify import ExportReport, compare, load_stock, source_encoder
from medssl.networks.flexible_unet import LAYERS, PLAIN
from medssl.weights import load_part, save_part

STEM = "conv1.weight"
STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Target:
    """A stock network with a ResNet inside.

    Args:
        to: Name of the export.
        models: timm names that it takes.
        build: (model, channels, dims) -> stock network, and the expression that builds it, for people.
        prefix: Of the trunk's keys in the stock network.
        random: Prefixes of keys that keep their random start.
        dims: Accepted spatial axes, the default first.
        channels: The only number of input channels of the stock class, None where it is an argument.
        zero_bias: The stock trunk has a bias in its shortcut convolutions, which timm's has not.
        note: What a user must know, from the model's name.
    """

    to: str
    models: Sequence[str]
    build: Callable[[str, int, int], tuple[Any, str]]
    prefix: str = ""
    random: tuple[str, ...] = ()
    dims: tuple[int, ...] = (2,)
    channels: int | None = None
    zero_bias: bool = False
    note: Callable[[str], list[str]] = lambda model: []

    @property
    def name(self) -> str:
        """Of the file."""
        return self.to.replace("-", "_")


def write(folder: Path, weights: Weights, target: Target, asked: Adaptation) -> ExportReport:
    """Write `<name>.safetensors` and `.json`, reload them into the stock network and compare the stem and all stages.

    Args:
        folder: Existing, empty.
        weights: With a ResNet of timm as (slice) encoder.
        target: The stock network.
        asked: What the user wants changed.

    Raises:
        RequestError: The stock network has no such channels or axes.
        WeightsError: It has no such network, or the reloaded features differ.
    """
    weights = slice_encoder_of(weights, target.to)
    model = plain_model(weights, target)
    source = source_encoder(weights)
    dims = asked.dims or target.dims[0]
    channels = asked.channels or target.channels or source.in_channels
    if dims not in target.dims or target.channels not in (None, channels):
        raise RequestError(
            f"export to {target.to} has {' or '.join(map(str, target.dims))} spatial axes and {target.channels or 'any number of'} "
            f"input channels; asked for: dims {dims}, channels {channels}"
        )
    state, notes = adapt_stem(weights.state, STEM, channels)
    if dims == 3:
        state, more = inflate(state, asked.inflation)
        notes += more
    if target.zero_bias:
        state, more = with_zero_biases(state)
        notes += more
    network, expression = target.build(model, channels, dims)
    facts = {"load_into": expression, "adaptations": notes, "dims": dims}
    manifest = {
        **weights.manifest,
        "channels": channels,
        "axis_order": INFLATED_ORDER if dims == 3 else weights.manifest["axis_order"],
    }
    named = {target.prefix + key: value for key, value in state.items()}
    path = save_part(folder, target.name, named, exported_manifest(manifest, to=target.to, **facts))
    reloaded, _ = load_part(path)
    missing = load_stock(network, reloaded, allowed_missing=target.random)
    difference = compare(pairs(source, network.eval().double(), target, channels, dims, asked), target.to)
    return ExportReport(
        files=(path, path.with_suffix(".json")),
        matched=tuple(sorted(named)),
        missing=missing,
        unexpected=(),
        max_feature_difference=difference,
        notes=(f"load into {expression}", *notes, *target.note(model)),
    )


def plain_model(weights: Weights, target: Target) -> str:
    """Return the timm name, without a weights tag.

    Raises:
        WeightsError: The stock class cannot be this network.
    """
    model = str(weights.args["model"]).partition(".")[0]
    if model not in target.models:
        raise WeightsError(
            f"export to {target.to}: the slice encoder is {model}; {target.to} takes {', '.join(target.models)}; "
            "export to timm or safetensors instead"
        )
    other = sorted(set(weights.args.get("model_args") or {}) - set(PLAIN))
    if other:
        raise WeightsError(
            f"export to {target.to}: the slice encoder was built with model_args {', '.join(other)}; {target.to} takes the plain {model} "
            "(batch norm, 7x7 stem of stride 2, stride 32); export to timm or safetensors instead"
        )
    return model


def with_zero_biases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Add the bias of shortcut convolutions that MONAI's ResNet has unless told otherwise; zero changes nothing."""
    kernels = {key: value for key, value in state.items() if key.endswith("downsample.0.weight")}
    biases = {key.removesuffix("weight") + "bias": torch.zeros(len(value), dtype=value.dtype) for key, value in kernels.items()}
    note = f"{len(biases)} biases of zero added (layerN.0.downsample.0.bias): MONAI's ResNet has them by default"
    return {**state, **biases}, [note]


def pairs(
    source: Any, network: nn.Module, target: Target, channels: int, dims: int, asked: Adaptation
) -> list[tuple[Tensor, Tensor]]:
    """Return (stock, source) maps after the stem and each stage, on a fixed image; along depth, where there is one, it is constant.

    Zero padding at both ends of the depth is no part of what is compared: repeated kernels meet the image again there instead.
    """
    size = tuple(k * m for k, m in zip((2, 3), source.multiple, strict=True))
    mine, theirs = grey_or_random(source.in_channels, channels, size)
    trunk = network.get_submodule(target.prefix.rstrip("."))
    if dims == 3:
        theirs = theirs[..., None].expand(-1, -1, -1, -1, 3)
        if asked.inflation == "repeat":
            repeat_ends(trunk)
    with torch.no_grad():
        expected = source.forward_features(mine).pyramid
        found = maps_of(trunk, theirs)
    if dims == 3:
        expected = [m[..., None].expand_as(f) if m.shape == f.shape[:-1] else m for m, f in zip(expected, found)]
    return list(zip(found, expected, strict=True))


def maps_of(trunk: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the maps after the stem's activation and each stage of a ResNet, whatever it returns itself."""
    maps: list[Tensor] = []
    stem = "relu" if hasattr(trunk, "relu") else "act"
    for name in (stem, *STAGES):
        trunk.get_submodule(name).register_forward_hook(lambda _module, _args, output: maps.append(output.clone()))
    trunk(image)
    return maps


def repeat_ends(network: nn.Module) -> None:
    """Pad the depth (last axis) of every convolution and pooling with its end slices instead of zeros, for good."""
    for module in network.modules():
        if not isinstance(module, nn.Conv3d | nn.MaxPool3d):
            continue
        padding = module.padding if isinstance(module.padding, tuple) else (int(module.padding),) * 3
        ends = int(padding[-1])
        if ends == 0:
            continue
        module.padding = (*padding[:-1], 0)

        def pad(_module: nn.Module, args: tuple[Tensor, ...], ends: int = ends) -> Tensor:
            return nn.functional.pad(args[0], (ends, ends, 0, 0, 0, 0), mode="replicate")

        module.register_forward_pre_hook(pad)


def monai_arguments(model: str, channels: int, dims: int) -> str:
    """Return the arguments of MONAI's ResNet functions that make it timm's network, for people."""
    return f"{model}(spatial_dims={dims}, n_input_channels={channels}, conv1_t_stride=2, feed_forward=False)"


def monai_resnet(model: str, channels: int, dims: int) -> Any:
    """Build MONAI's ResNet with the layers of a timm network; a stride of 1 in the stem is MONAI's default and would not be it."""
    from monai.networks.nets import ResNet

    block, layers = LAYERS[model]
    return ResNet(
        block, list(layers), [64, 128, 256, 512], spatial_dims=dims, n_input_channels=channels, conv1_t_stride=2, feed_forward=False
    )
