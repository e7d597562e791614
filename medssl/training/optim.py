"""Optimisers and their parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

NO_DECAY = ("position_embeddings", "mask_token", "cls_token", "relative_position_bias_table")


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser of one stage.

    Args:
        name: `adamw` or `sgd` (Nesterov).
        lr: Peak learning rate.
        weight_decay: Decoupled for AdamW.
        betas: AdamW.
        momentum: SGD.
        layer_decay: Factor per layer below the last (Bao et al. 2022, BEiT); None for one rate everywhere.
        lr_scales: Name pattern -> factor on the rate; the first match counts. 0 freezes for now while gradients still flow.
        clip_grad: Maximal gradient norm, None for no clipping.
        schedule: `cosine` or `constant_anneal`.
        warmup_steps: Linear warm-up.
        final_lr: Rate at the last step.
        anneal_steps: For `constant_anneal`.
    """

    name: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    layer_decay: float | None = None
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    clip_grad: float | None = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_lr: float = 0.0
    anneal_steps: int = 0


def is_decayed(name: str, parameter: Tensor) -> bool:
    """True for weights of two or more axes; norms, biases, position tables and mask tokens are not decayed."""
    return parameter.ndim > 1 and not name.endswith(".bias") and not any(word in name for word in NO_DECAY)


def layer_scales(names: Iterable[str], blocks: Mapping[str, int], depth: int, decay: float) -> dict[str, float]:
    """Return the layer-wise factor of each parameter: decay^(depth - layer).

    Args:
        names: Parameter names.
        blocks: Name prefix of an encoder block -> layer number, 1 to depth - 1; the stem has layer 0.
        depth: Layer number of everything that is not encoder (heads, decoder), which gets factor 1.
        decay: Factor per layer.
    """
    scales = {}
    for name in names:
        layer = next((number for prefix, number in blocks.items() if name.startswith(prefix)), depth)
        scales[name] = decay ** (depth - layer)
    return scales


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and learning-rate factor.

    Args:
        named: Names and parameters; those with requires_grad False are left out.
        settings: The optimiser's settings.
        scales: Layer-wise factors by name.

    Returns:
        Groups with `params`, `weight_decay`, `lr_scale` and `names`, in a fixed order.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        factor = (scales or {}).get(name, 1.0)
        factor *= next((value for pattern, value in settings.lr_scales.items() if fnmatchcase(name, pattern)), 1.0)
        decay = settings.weight_decay if is_decayed(name, parameter) else 0.0
        group = groups.setdefault(
            (factor, decay), {"params": [], "weight_decay": decay, "lr_scale": factor, "lr": settings.lr * factor, "names": []}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def build_optimiser(groups: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    """Build AdamW or SGD with the state of every parameter in place.

    torch.distributed.checkpoint cannot load the state of a parameter that had none when it was saved, so zeros are put there now; the
    first step is the same as from an empty state.
    """
    if settings.name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
        for group in adamw.param_groups:
            for parameter in group["params"]:
                adamw.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        return adamw
    sgd = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return sgd


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to `lr` times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]


def carry_moments(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Copy the optimiser state of parameters that both optimisers hold, by name."""
    known = {
        name: old.state[parameter]
        for group in old.param_groups
        for name, parameter in zip(group["names"], group["params"])
        if parameter in old.state
    }
    for group in new.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            if name in known and known[name].keys() == new.state[parameter].keys():
                new.state[parameter] = known[name]
