"""Health monitors: what a run looks at besides its loss, and when it stops by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medssl.errors import TrainingStopped
from medssl.feature_statistics import alignment, effective_rank, feature_std, uniformity


def feature_monitors(first: Tensor, second: Tensor) -> dict[str, float]:
    """Describe frozen features of two views of the same items.

    Args:
        first: (N, E) features of one view of each item.
        second: (N, E) features of another.

    Returns:
        `monitor/feature_std` (of L2-normalised features, 1/sqrt(E) when spread evenly, 0 when collapsed), `monitor/effective_rank`
        (1 to min(N, E); of centred features, so that a common offset does not hide or fake a collapse), `monitor/alignment` and
        `monitor/uniformity`.
    """
    centred = first - first.mean(dim=0, keepdim=True)
    return {
        "monitor/feature_std": float(feature_std(first)),
        "monitor/effective_rank": float(effective_rank(centred)),
        "monitor/alignment": float(alignment(first, second)),
        "monitor/uniformity": float(uniformity(first)),
    }


def check_finite(loss: float, grad_norm: float, step: int) -> None:
    """Stop the run at a NaN or infinity.

    Raises:
        TrainingStopped: With what to try.
    """
    if not (torch.isfinite(torch.tensor(loss)) and torch.isfinite(torch.tensor(grad_norm))):
        raise TrainingStopped(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the last checkpoint is safe. "
            "Try a lower optim.lr, a longer optim.schedule.warmup_steps, optim.clip_grad=1 or train.precision=fp32, then --resume"
        )


class CollapseMonitor:
    """Stops a run whose features have collapsed to a point or a line.

    Args:
        min_std: Smallest feature std that counts as alive.
        min_rank: Smallest effective rank that counts as alive.
        patience: Consecutive measurements below a limit before the run stops.
    """

    def __init__(self, *, min_std: float = 1e-4, min_rank: float = 1.05, patience: int = 2) -> None:
        self.min_std = min_std
        self.min_rank = min_rank
        self.patience = patience
        self.strikes = 0

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Look at one measurement.

        Raises:
            TrainingStopped: The features have been collapsed for `patience` measurements.
        """
        std, rank = metrics["monitor/feature_std"], metrics["monitor/effective_rank"]
        self.strikes = self.strikes + 1 if std < self.min_std or rank < self.min_rank else 0
        if self.strikes >= self.patience:
            raise TrainingStopped(
                f"step {step}: the features have collapsed (std {std:.2g}, limit {self.min_std:.2g}; effective rank {rank:.2f}, "
                f"limit {self.min_rank:.2f}). The last checkpoint is safe. Try a lower optim.lr, more warm-up, or larger batches; "
                "check with `medssl report` that the images are not constant after normalisation"
            )
