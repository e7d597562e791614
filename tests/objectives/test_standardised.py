"""Embeddings standardised over the micro-batch: the formula, and that they cannot all be alike."""

from __future__ import annotations

import torch

from medssl.objectives.intra_inter_clustering import standardised
from medssl.types import StepContext
from tests.objectives.stacks import make_views
from tests.objectives.test_intra_inter_clustering import build


def test_standardised__mean_0_variance_1_over_all_crops() -> None:
    torch.manual_seed(0)
    crops = [5 + 0.01 * torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    rows = torch.cat(standardised(crops))
    assert torch.allclose(rows.mean(dim=0), torch.zeros(4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(rows.var(dim=0, correction=0), torch.ones(4, dtype=torch.float64), atol=1e-3)
    assert [len(z) for z in standardised(crops)] == [6, 6, 6]


def test_standardised__constant_channels_and_single_rows_stay_finite() -> None:
    constant = torch.full((4, 3), 2.0, requires_grad=True)
    (rows,) = standardised([constant])
    rows.square().sum().backward()
    assert torch.equal(rows, torch.zeros(4, 3)) and constant.grad is not None and constant.grad.isfinite().all()
    single = [torch.randn(1, 3), torch.randn(1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(standardised(single), single))


def test_objective__nearly_equal_embeddings_give_sharp_targets_only_when_standardised() -> None:
    views = make_views("image", 5)
    sharp = []
    for on in (False, True):
        objective = build(standardise=on)
        with torch.no_grad():
            objective.projector[-1].weight.mul_(1e-3)
            objective.projector[-1].bias.fill_(1.0)
        parts = objective(views, StepContext())
        sharp.append(float(parts["intra_target_sharpness"]))
    assert sharp[0] < 0.01 < 0.1 < sharp[1]
