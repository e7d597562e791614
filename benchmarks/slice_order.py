"""Does the aggregator see the order of slices? Pattern A below pattern B or above it, in 32 noisy slices (card 9.5).

    python -m benchmarks.slice_order

The mean over slices holds nothing about order, so a perceptron on it must stay at chance; the aggregator must solve the task,
and reversing the slices must flip its answers. If attention ran over channels instead of slices, it could not.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Check, Result, finish, parser
from medssl.layers.deformable import SliceAggregator

CHANCE_LIMIT, SOLVED, FLIPPED = 0.6, 0.95, 0.05
GAP, STRENGTH = 4, 8.0
"""Slices between the patterns; length of a pattern, where the noise of a slice of 32 channels has length 5.7."""


class MeanPool(nn.Module):
    """Perceptron on the mean of the slices."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(tokens.mean(dim=1))[:, 0]  # type: ignore[no-any-return]


class Aggregated(nn.Module):
    """Linear readout of the aggregator's volume embedding.

    Args:
        dim: Width.
        attention: Flavour.
    """

    def __init__(self, dim: int, attention: str) -> None:
        super().__init__()
        made: Any = attention
        self.aggregator = SliceAggregator(dim, depth=2, heads=4, dim_head=16, hidden_dim=2 * dim, dropout=0.0, attention=made)
        self.head = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        z_mm = 2.5 * torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return self.head(self.aggregator(tokens, None, z_mm).pooled)[:, 0]  # type: ignore[no-any-return]


def stacks(generator: torch.Generator, patterns: Tensor, count: int, slices: int) -> tuple[Tensor, Tensor]:
    """Noise with pattern A in one slice and B in another at least `GAP` away, and whether A comes first."""
    tokens = torch.randn(count, slices, patterns.shape[1], generator=generator)
    first = torch.randint(slices - GAP, (count,), generator=generator)
    room = slices - GAP - first
    second = first + GAP + (torch.rand(count, generator=generator) * room).long()
    swap = torch.rand(count, generator=generator) < 0.5
    places = torch.stack([torch.where(swap, second, first), torch.where(swap, first, second)], dim=1)
    rows = torch.arange(count)
    for pattern, place in zip(patterns, places.T):
        tokens[rows, place] += pattern
    return tokens, (places[:, 0] < places[:, 1]).float()


def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        return float(((model(tokens) > 0).float() == labels).float().mean())


def probe(
    kind: str, *, seed: int, steps: int, batch: int = 64, slices: int = 32, dim: int = 32, lr: float = 5e-3, tests: int = 1000
) -> dict[str, float]:
    """Train on fresh stacks and test on others, as they are and with the slices reversed.

    Args:
        kind: `mean pool`, `per_query` or `grouped`.
        seed: Seed of patterns, stacks and weights.
        steps: Training steps.
        batch: Stacks per step.
        slices: Slices per stack.
        dim: Width of a slice.
        lr: Learning rate, cosine to zero.
        tests: Stacks that are tested on.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = STRENGTH * nn.functional.normalize(torch.randn(2, dim, generator=generator), dim=1)
    test, labels = stacks(torch.Generator().manual_seed(10_000 + seed), patterns, tests, slices)
    model = MeanPool(dim) if kind == "mean pool" else Aggregated(dim, kind)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    begin = time.perf_counter()
    for _ in range(steps):
        tokens, label = stacks(generator, patterns, batch, slices)
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(tokens), label).backward()
        optimiser.step()
        schedule.step()
    seconds = time.perf_counter() - begin
    return {
        "accuracy": accuracy(model, test, labels),
        "accuracy_reversed": accuracy(model, test.flip(1), labels),
        "train_s": seconds,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=3)
    options_parser.add_argument("--steps", type=int, default=400)
    options_parser.add_argument("--tests", type=int, default=1000)
    options_parser.add_argument("--kinds", nargs="+", default=["mean pool", "per_query", "grouped"])
    options = options_parser.parse_args(argv)
    rows: list[dict[str, Any]] = [
        {"model": kind, "seed": seed, **probe(kind, seed=seed, steps=options.steps, tests=options.tests)}
        for kind in options.kinds
        for seed in range(options.repeats)
    ]
    checks = []
    for kind in options.kinds:
        own = [row for row in rows if row["model"] == kind]
        if kind == "mean pool":
            checks.append(Check("mean pool, accuracy", max(row["accuracy"] for row in own), CHANCE_LIMIT, at_least=False))
        else:
            checks.append(Check(f"{kind}, accuracy", min(row["accuracy"] for row in own), SOLVED))
            worst = max(row["accuracy_reversed"] for row in own)
            checks.append(Check(f"{kind}, accuracy on reversed stacks", worst, FLIPPED, at_least=False))
    notes = [
        f"checks take the worst seed; {options.tests} test stacks, so one standard error at chance is {0.5 * options.tests**-0.5:.2g}"
    ]
    return finish(Result("slice_order", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
