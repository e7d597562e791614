"""Schedules, optimiser groups, EMA, monitors: formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from medssl.errors import TrainingStopped
from medssl.training.ema import update_ema
from medssl.training.monitors import CollapseMonitor, check_finite, feature_monitors
from medssl.training.optim import OptimSettings, build_optimiser, carry_moments, layer_scales, parameter_groups, set_lr
from medssl.training.schedules import warmup_constant_anneal, warmup_cosine


def test_warmup_cosine__matches_a_plain_table() -> None:
    values = [warmup_cosine(s, steps=10, base=2.0, final=0.5, warmup=4) for s in range(10)]
    assert values[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert values[4:] == pytest.approx([0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * (s - 3) / 6)) for s in range(4, 10)])
    assert values[-1] == pytest.approx(0.5)
    assert warmup_cosine(25, steps=10, base=2.0, final=0.5) == 0.5


def test_warmup_constant_anneal__does_not_depend_on_the_length_before_the_end() -> None:
    short = [warmup_constant_anneal(s, steps=20, base=1.0, warmup=5, anneal=5) for s in range(20)]
    long = [warmup_constant_anneal(s, steps=40, base=1.0, warmup=5, anneal=5) for s in range(40)]
    assert short[:15] == long[:15]
    assert short[5:15] == [1.0] * 10
    assert short[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in zip(short[14:], short[15:]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_parameter_groups__decay_weights_only() -> None:
    net = Net()
    groups = parameter_groups(net.named_parameters(), OptimSettings(weight_decay=0.1, lr_scales={"linear.*": 0.5}))
    decayed = {name for group in groups if group["weight_decay"] > 0 for name in group["names"]}
    assert decayed == {"linear.weight"}
    every = [name for group in groups for name in group["names"]]
    assert sorted(every) == ["linear.bias", "linear.weight", "mask_token", "norm.bias", "norm.weight"]
    optimiser = build_optimiser(groups, OptimSettings(lr=1.0))
    set_lr(optimiser, 0.2)
    rates = {name: group["lr"] for group in optimiser.param_groups for name in group["names"]}
    assert rates["linear.weight"] == pytest.approx(0.1)
    assert rates["norm.weight"] == pytest.approx(0.2)


def test_layer_scales__fall_with_depth() -> None:
    names = ["e.stem.w", "e.blocks.0.w", "e.blocks.1.w", "e.norm.w", "head.w"]
    scales = layer_scales(names, {"e.blocks.0.": 1, "e.blocks.1.": 2, "e.stem.w": 0}, 3, 0.5)
    assert scales == {"e.stem.w": 0.125, "e.blocks.0.w": 0.25, "e.blocks.1.w": 0.5, "e.norm.w": 1.0, "head.w": 1.0}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_prepared_state__changes_no_step(name: str) -> None:
    settings = OptimSettings(name=name, lr=0.1, weight_decay=0.1)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimiser(parameter_groups(ours.named_parameters(), settings), settings)
    groups = [{"params": [theirs.bias], "weight_decay": 0.0}, {"params": [theirs.weight], "weight_decay": 0.1}]
    stock: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=0.1, betas=settings.betas)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    )
    for step in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for net, optimiser in ((ours, mine), (theirs, stock)):
            optimiser.zero_grad()
            net(x).square().sum().backward()
            optimiser.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-7)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-7)


def test_carry_moments__copies_by_name() -> None:
    settings = OptimSettings()
    net = Net()
    old = build_optimiser(parameter_groups(net.named_parameters(), settings), settings)
    net.linear(torch.randn(2, 3)).sum().backward()
    old.step()
    net.norm.requires_grad_(False)
    new = build_optimiser(parameter_groups(net.named_parameters(), settings), settings)
    carry_moments(old, new)
    assert torch.equal(new.state[net.linear.weight]["exp_avg"], old.state[net.linear.weight]["exp_avg"])
    assert float(new.state[net.linear.weight]["step"]) == 1


def test_update_ema__averages_parameters_and_floating_buffers() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    bn: nn.BatchNorm1d = student[1]  # type: ignore[assignment]
    assert bn.running_mean is not None and bn.num_batches_tracked is not None
    bn.running_mean.fill_(4.0)
    bn.num_batches_tracked.fill_(7)
    before = [p.clone() for p in teacher.parameters()]
    update_ema(student, teacher, 0.75)
    for old, new, target in zip(before, teacher.parameters(), student.parameters()):
        assert torch.allclose(new, 0.75 * old + 0.25 * target)
    twin: nn.BatchNorm1d = teacher[1]  # type: ignore[assignment]
    assert twin.running_mean is not None and twin.num_batches_tracked is not None
    assert torch.allclose(twin.running_mean, torch.full((2,), 1.0))
    assert int(twin.num_batches_tracked) == 7


def test_collapse_monitor__waits_for_patience() -> None:
    monitor = CollapseMonitor(patience=2)
    dead = {"monitor/feature_std": 1e-6, "monitor/effective_rank": 1.0}
    alive = {"monitor/feature_std": 0.1, "monitor/effective_rank": 5.0}
    monitor.check(dead, 1)
    monitor.check(alive, 2)
    monitor.check(dead, 3)
    with pytest.raises(TrainingStopped, match="the features have collapsed"):
        monitor.check(dead, 4)


def test_feature_monitors__tell_collapsed_from_spread_features() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 16, generator=rng)
    line = torch.rand(64, 1, generator=rng) * torch.ones(1, 16) + 3
    good, bad = feature_monitors(spread, spread), feature_monitors(line, line)
    assert good["monitor/effective_rank"] > 10 > 2 > bad["monitor/effective_rank"]
    assert good["monitor/alignment"] == 0
    assert good["monitor/feature_std"] > 10 * bad["monitor/feature_std"]


def test_check_finite__stops() -> None:
    check_finite(1.0, 2.0, 0)
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(TrainingStopped, match="the last checkpoint is safe"):
            check_finite(loss, norm, 3)
