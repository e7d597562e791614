"""Features brought to mean 0 and variance 1, channel by channel, over all processes: of a micro-batch, or by running statistics.

Features of a fresh network have most of their length in common. Of what is left after centring, a teacher can only say that all outputs are
alike, and its student learns just that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn import functional as between_ranks

from medssl.layers.sinkhorn import sum_ranks, world_size


def standardised(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Give every channel mean 0 and variance 1 over the rows of a micro-batch of all processes; fewer than three rows stay as they are.

    Rows that are standardised together cannot all be alike, however fast the network moves what they have in common. Gradients cross
    processes, so that two of them equal one; all must call this equally often.

    Args:
        x: (..., E) features.
        weight: (...) what each row counts; rows of weight 0 are as if they were not there. None: all alike.

    Returns:
        (..., E), in float32 or better.
    """
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    share = (torch.ones_like(rows[..., 0]) if weight is None else weight.to(rows.dtype))[..., None]
    over = tuple(range(x.ndim - 1))
    total, count = sum_ranks(torch.stack([share.sum(), (share > 0).sum()]))
    total = total.clamp_min(1e-12)
    mean = _over_ranks((rows * share).sum(dim=over)) / total
    variance = _over_ranks(((rows - mean).square() * share).sum(dim=over)) / total
    unit = (rows - mean) * (variance + 1e-5 * variance.mean().detach() + 1e-12).rsqrt()
    return torch.where(count < 3, rows, unit)


def _over_ranks(x: Tensor) -> Tensor:
    """Return the sum over all processes, with gradient."""
    return x if world_size() == 1 else between_ranks.all_reduce(x)  # type: ignore[no-untyped-call]


class RunningStandard(nn.Module):
    """Features brought to mean 0 and variance 1 by running statistics over all processes and micro-steps.

    Args:
        dim: E.
        momentum: Of the running statistics; the first step that is seen counts fully.
    """

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.variance: Tensor
        self.known: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("known", torch.tensor(False))
        self._pending: list[Tensor] = []

    def reset(self) -> None:
        """Forget what a step that was not finished has noted."""
        self._pending = []

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return standardised features (M, E); in training, note them, rows by weight (M,), for the next update.

        Before the first update the statistics are those of the micro-batch itself.
        """
        mean, variance = self.mean, self.variance
        if self.training:
            with torch.no_grad():
                rows, share = x.detach().double(), weight.double()
                self._pending.append(torch.cat([share @ rows, share @ rows.square(), share.sum()[None]]))
                if not bool(self.known):
                    mean, variance = self._moments(sum_ranks(self._pending[-1]))
        return (x - mean.to(x.dtype)) / variance.to(x.dtype).clamp_min(1e-6).sqrt()

    @staticmethod
    def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
        mean, square = (sums[:-1] / sums[-1].clamp_min(1e-12)).chunk(2)
        return mean, (square - mean.square()).clamp_min(0)

    @torch.no_grad()
    def update(self) -> None:
        """Move. Called once per optimiser step, by all processes."""
        if not self._pending:
            return
        total = sum_ranks(torch.stack(self._pending).sum(dim=0))
        self._pending = []
        if float(total[-1]) <= 0:
            return
        share = 1.0 - self.momentum if bool(self.known) else 1.0
        for kept, found in zip((self.mean, self.variance), self._moments(total)):
            kept.lerp_(found.to(kept.dtype), share)
        self.known.fill_(True)
