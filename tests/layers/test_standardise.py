"""Mean 0 and variance 1: over a micro-batch, and by running statistics."""

from __future__ import annotations

import torch

from medssl.layers.standardise import RunningStandard, standardised


def test_standardised__formula_by_weight() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64) * 0.01 + torch.tensor([5.0, -2.0, 0.3])
    weight = torch.rand(4, 5, dtype=torch.float64)
    weight[1] = 0.0
    rows = standardised(x, weight)
    share = weight[..., None] / weight.sum()
    assert torch.allclose((rows * share).sum(dim=(0, 1)), torch.zeros(3).double(), atol=1e-9)
    assert torch.allclose((rows.square() * share).sum(dim=(0, 1)), torch.ones(3).double(), rtol=1e-3)
    kept = [0, 2, 3]
    assert torch.allclose(rows[kept], standardised(x[kept], weight[kept]), rtol=1e-12)
    assert torch.equal(standardised(x), standardised(x, torch.ones(4, 5)))


def test_standardised__constant_channels_and_few_rows_stay_finite() -> None:
    constant = torch.full((4, 3), 2.0, requires_grad=True)
    rows = standardised(constant)
    rows.square().sum().backward()
    assert torch.equal(rows, torch.zeros(4, 3)) and constant.grad is not None and constant.grad.isfinite().all()
    few = torch.randn(2, 3)
    assert torch.equal(standardised(few), few)
    more = torch.randn(4, 3)
    assert torch.equal(standardised(more, torch.tensor([1.0, 1.0, 0.0, 0.0])), more)


def test_running_standard__takes_the_first_step_whole_and_then_moves() -> None:
    torch.manual_seed(0)
    layer, x = RunningStandard(4, 0.9), 3 * torch.randn(500, 4) + 10
    standard = layer(x, torch.ones(500))
    assert torch.allclose(standard.mean(dim=0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(standard.std(dim=0, correction=0), torch.ones(4), atol=1e-4)
    layer.update()
    assert torch.allclose(layer.mean, x.mean(dim=0), atol=1e-4)
    layer(torch.zeros(7, 4), torch.ones(7))
    layer.update()
    assert torch.allclose(layer.mean, 0.9 * x.mean(dim=0), atol=1e-4)
    assert torch.allclose(layer.variance, 0.9 * x.var(dim=0, correction=0), rtol=1e-4)
