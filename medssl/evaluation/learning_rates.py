"""Learning rates of an encoder and what was put on it: warm-up and cosine, frozen steps, decay from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer


class Schedule(Protocol):
    """What learning rates depend on."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        ...

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        ...

    @property
    def freeze_steps(self) -> int:
        """First steps in which a pretrained encoder does not learn."""
        ...

    @property
    def layer_decay(self) -> float:
        """Factor from block to block of a pretrained encoder."""
        ...

    @property
    def encoder_lr_scale(self) -> float:
        """Factor on the learning rate of a pretrained encoder."""
        ...


def layer_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of every parameter of an encoder: decay to the power of its distance from the head.

    A parameter outside the blocks is as far as the last of `encoder.blocks` that is registered before it: a norm or a downsampling layer
    goes with the block whose output it takes, the projection of `slice_volume` with the last block of its slice encoder. What comes
    before the first block (patch embedding, stem) is one step further away than that; positions and class tokens are there too, since
    PyTorch names the parameters of a module before those of its parts. The blocks of a decoder that the encoder carries are not counted.

    Reference:
        Clark et al. 2020 (ELECTRA); Bao et al. 2022 (BEiT), appendix H.
    """
    blocks = encoder_blocks(encoder)
    depth = {id(p): number for number, block in enumerate(blocks, start=1) for p in block.parameters()}
    last, scales = 0, {}
    for name, parameter in encoder.named_parameters():
        place = depth.get(id(parameter), last)
        last = max(last, place)
        scales[name] = decay ** (len(blocks) + 1 - place)
    return scales


def encoder_blocks(encoder: nn.Module) -> list[nn.Module]:
    """Return `encoder.blocks` without those of a decoder, as SegResNet, SwinUNETR and the residual-encoder U-Net have one."""
    groups: Mapping[str, Sequence[str]] = getattr(encoder, "key_groups", {})
    net = getattr(encoder, "net", encoder)
    own = {id(p) for name, p in net.named_parameters() if name.startswith(tuple(groups.get("encoder", [""])))}
    return [
        block
        for block in getattr(encoder, "blocks", [])
        if "encoder" not in groups or any(id(p) in own for p in block.parameters())
    ]


def learning_rate(step: int, settings: Schedule, freeze: int) -> tuple[float, float]:
    """Return the factors on the learning rates of encoder and head: linear warm-up, and cosine decay to 0.

    With `freeze` the encoder has 0 first while the head warms up; then both warm up from 0 ("sawtooth", OpenMind benchmark,
    arXiv 2412.17041).
    """
    rise = max(1, settings.warmup_steps)
    if step < freeze:
        return 0.0, min(1.0, (step + 1) / rise)
    start = freeze + settings.warmup_steps
    if step < start:
        factor = (step - freeze + 1) / rise
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, settings.steps - start)))
    return factor, factor


def set_learning_rates(optimizer: Optimizer, step: int, settings: Schedule, *, pretrained: bool) -> tuple[float, float]:
    """Set the learning rates of a step, and return those of encoder and head, before the decay from layer to layer.

    Args:
        optimizer: Of `parameter_groups` with the factors of `encoder_factors`.
        step: From 0.
        settings: See there.
        pretrained: Whether the encoder is; else no step is frozen and the encoder learns as the head does.
    """
    encoder, head = learning_rate(step, settings, settings.freeze_steps if pretrained else 0)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * group["scale"] * (encoder if group["encoder"] else head)
    return settings.lr * encoder * (settings.encoder_lr_scale if pretrained else 1.0), settings.lr * head


def hold_norms(network: nn.Module, optimizer: Optimizer, step: int, settings: Schedule, *, pretrained: bool) -> None:
    """Keep the statistics of the encoder's batch norms in the steps in which its weights are frozen.

    Args:
        network: In training mode.
        optimizer: Of `parameter_groups`, which knows what is of the encoder.
        step: From 0.
        settings: See there.
        pretrained: Whether the encoder is; else no step is frozen.
    """
    for_good = settings.encoder_lr_scale == 0
    if not pretrained or (step > settings.freeze_steps and not for_good):
        return
    if step == settings.freeze_steps and not for_good:
        network.train()  # by the network's own rule: an encoder may keep its norms frozen for good
        return
    inside = {id(p) for group in optimizer.param_groups if group["encoder"] for p in group["params"]}
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module.weight) in inside:
            module.eval()


def encoder_factors(encoder: nn.Module, settings: Schedule, *, pretrained: bool) -> dict[str, float]:
    """Return the factor on the learning rate of every parameter of an encoder, by its name there; 1 where it is not pretrained."""
    scales = layer_scales(encoder, settings.layer_decay if pretrained else 1.0)
    return {name: scale * (settings.encoder_lr_scale if pretrained else 1.0) for name, scale in scales.items()}


def factors_inside(network: nn.Module, encoder: str, settings: Schedule, *, pretrained: bool) -> dict[str, float]:
    """Return `encoder_factors` of the encoder that a network has at a dotted name, by name in the network."""
    found = encoder_factors(network.get_submodule(encoder), settings, pretrained=pretrained)
    return {f"{encoder}.{name}": factor for name, factor in found.items()}


def parameter_groups(network: nn.Module, factors: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups of what trains, by part, factor and decay (none on norms and biases).

    Args:
        network: Has an encoder somewhere inside.
        factors: Factor on the learning rate of every parameter of the encoder, by name in the network; what is not named is the head.
        weight_decay: Of parameters of more than one axis.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in factors, factors.get(name, 1.0), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "encoder": inside, "scale": scale, "weight_decay": weight_decay if decays else 0.0}
        for (inside, scale, decays), members in sorted(groups.items(), key=lambda item: item[0])
    ]
