"""Embeddings standardised over the micro-batch cannot all be alike."""

from __future__ import annotations

import torch

from medssl.types import StepContext
from tests.objectives.stacks import make_views
from tests.objectives.test_intra_inter_clustering import build


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
