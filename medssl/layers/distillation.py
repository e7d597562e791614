"""What self-distillation objectives share: unit heads, cross-entropy with a centred teacher, and what tells a collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.layers.sinkhorn import sum_ranks


def cross_entropy(
    teacher: Tensor, centre: Tensor, teacher_temperature: float, student: Tensor, student_temperature: float
) -> Tensor:
    """Return H(softmax((teacher - centre) / T_t), softmax(student / T_s)), in float32 or better.

    Args:
        teacher: (..., K) logits; no gradient reaches them.
        centre: (K,).
        teacher_temperature: T_t.
        student: (..., K) logits.
        student_temperature: T_s.

    Returns:
        (...).
    """
    with torch.autocast(student.device.type, enabled=False):
        kind = torch.promote_types(student.dtype, torch.float32)
        target = ((teacher.detach().to(kind) - centre.to(kind)) / teacher_temperature).softmax(dim=-1)
        return -(target * (student.to(kind) / student_temperature).log_softmax(dim=-1)).sum(dim=-1)


def entropy_share(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) as a share of ln K, mean over rows: 1 is uniform, 0 one-hot."""
    logs = logits.float().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1).mean() / math.log(logits.shape[-1])


class UnitLinear(nn.Module):
    """A linear layer without bias whose rows have length 1 (weight norm with gain 1), in float32 or better.

    Args:
        dim: Inputs.
        count: Outputs K.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(functional.normalize(torch.randn(count, dim), dim=1))

    def forward(self, z: Tensor, *, frozen: bool = False) -> Tensor:
        """Return the logits (..., K) of (..., dim); `frozen` gives the weights a gradient of zero, not none."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            weight = self.weight.detach() + 0.0 * self.weight if frozen else self.weight
            return z @ functional.normalize(weight.to(z.dtype), dim=1).T


class UnitHead(nn.Module):
    """MLP, brought to length 1, then cosines with K directions.

    Args:
        dim: Inputs.
        hidden: Width of the two hidden layers.
        bottleneck: Width that is brought to length 1.
        count: Outputs K.

    Reference:
        Caron et al. 2021 (DINO), section 3.1 and appendix C.
    """

    def __init__(self, dim: int, *, hidden: int, bottleneck: int, count: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
                nn.init.zeros_(layer.bias)
        self.last = UnitLinear(bottleneck, count)

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """Return the logits (..., K) of features (..., dim); `frozen` as in `UnitLinear`."""
        z = self.mlp(x)
        z = functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        return self.last(z, frozen=frozen)  # type: ignore[no-any-return]


class Centre(nn.Module):
    """Running mean of the raw logits of a teacher, over all processes and micro-steps.

    A mean of probabilities is no centre: before a collapse its entries are about 1 / K, after it they push back by 1 at most.

    Args:
        count: K.
        momentum: Of the running mean.
    """

    def __init__(self, count: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.value: Tensor
        self.register_buffer("value", torch.zeros(count))
        self._pending: list[Tensor] = []

    def reset(self) -> None:
        """Forget what a step that was not finished has noted."""
        self._pending = []

    @torch.no_grad()
    def note(self, logits: Tensor, weight: Tensor) -> None:
        """Take in logits (M, K) of a micro-batch, which count by weight (M,)."""
        rows, share = logits.detach().double(), weight.double()
        self._pending.append(torch.cat([share @ rows, share.sum()[None]]))

    @torch.no_grad()
    def update(self) -> None:
        """Move: c <- m c + (1 - m) mean. Called once per optimiser step, by all processes."""
        if not self._pending:
            return
        total = sum_ranks(torch.stack(self._pending).sum(dim=0))
        self._pending = []
        if float(total[-1]) > 0:
            self.value.lerp_((total[:-1] / total[-1]).to(self.value.dtype), 1.0 - self.momentum)


class RunningStandard(nn.Module):
    """Features brought to mean 0 and variance 1, channel by channel, by running statistics over all processes and micro-steps.

    Features of a fresh network have most of their length in common. Of what is left after centring, a teacher can only say that all outputs
    are alike, and its student learns just that.

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


@torch.no_grad()
def unit_spread(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return how differently features of a batch point, over all processes.

    Args:
        rows: (M, E) features of this process.
        weight: (M,); rows of weight 0 do not count, all others alike.

    Returns:
        The std over the batch of features of length 1, mean over channels, times sqrt(E): 1 when they point everywhere, 0 when they are
        alike. And how many features that were.
    """
    unit = functional.normalize(rows.detach().double(), dim=1)
    kept = (weight > 0).double()[:, None]
    sums = sum_ranks(torch.cat([(unit * kept).sum(dim=0), (unit.square() * kept).sum(dim=0), kept.sum()[None]]))
    mean, square = (sums[:-1] / sums[-1].clamp_min(1)).chunk(2)
    spread = (square - mean.square()).clamp_min(0).sqrt().mean() * math.sqrt(rows.shape[1])
    return spread.float(), sums[-1].float()
