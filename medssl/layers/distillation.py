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


def information(logits: Tensor, weight: Tensor) -> Tensor:
    """Return how much softmax(logits) tells rows apart: entropy of the mean less mean of the entropy, as a share of ln K.

    Args:
        logits: (..., K).
        weight: (...); what each row counts.

    Returns:
        0 where all rows say the same, be it that all prototypes are alike or that it is one of them; 1 where every row says another one
        of them. At most ln(rows) / ln K.
    """
    logs = logits.float().log_softmax(dim=-1).flatten(0, -2)
    share = weight.float().flatten() / weight.float().sum().clamp_min(1e-12)
    mean = share @ logs.exp()
    each = -(logs.exp() * logs).sum(dim=-1)
    return (-torch.xlogy(mean, mean).sum() - share @ each) / math.log(logits.shape[-1])


def start_small(module: nn.Module) -> None:
    """Start linear layers as DINO does, with small weights and without bias: a head then keeps what tells rows apart.

    With the usual start biases outgrow what tells rows apart from layer to layer, and rows that are brought to length 1 are more alike.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


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
        start_small(self.mlp)
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
