"""Can L_inter be solved without looking at the images? Stacks of pure noise whose two views share nothing but N and positions.

    python -m benchmarks.position_shortcut

Both views of a stack show the same planes, so they have the same number of slices and the same places in mm. If that alone tells stacks of
a batch apart, the clustering loss falls below ln K on noise, and on real images part of it is earned so. ln K is what remains where nothing
is shared: uniform predictions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Check, Result, finish, parser
from medssl.layers.deformable import SliceAggregator
from medssl.objectives.intra_inter_clustering import IntraInterClustering
from medssl.types import Part, StepContext, Views, ViewsMeta, ViewSpec

SLICES, SIDE = 16, 8
MARGIN = 0.02
"""Share of ln K by which a loss must lie below it to count as a shortcut; runs without one end within this of ln K."""

ARMS: dict[str, dict[str, Any]] = {
    "mm, N 4 to 16, step 1 to 6 mm": {"position": "mm", "fixed_n": False, "steps_mm": (1.0, 6.0)},
    "mm, N 16, step 1 to 6 mm": {"position": "mm", "fixed_n": True, "steps_mm": (1.0, 6.0)},
    "mm, N 16, step 3 mm": {"position": "mm", "fixed_n": True, "steps_mm": (3.0, 3.0)},
    "index, N 4 to 16": {"position": "index", "fixed_n": False, "steps_mm": (1.0, 6.0)},
    "index, N 16": {"position": "index", "fixed_n": True, "steps_mm": (1.0, 6.0)},
    "mm, N 16, step 1 to 6 mm, stretched 0.5 to 2": {"position": "mm", "fixed_n": True, "steps_mm": (1.0, 6.0), "stretch": 2.0},
    "mm, N 16, step 1 to 6 mm, stretched 0.25 to 4": {"position": "mm", "fixed_n": True, "steps_mm": (1.0, 6.0), "stretch": 4.0},
}


class NoiseEncoder(nn.Module):
    """A linear map of the pixels of a slice, and the real aggregator.

    Args:
        position: Of `SliceAggregator`.
        dim: Width.
    """

    takes_stacks = True

    def __init__(self, position: str, dim: int = 32) -> None:
        super().__init__()
        self.embed_dim, self.in_channels, self.patch_size = dim, 1, (1, 1, 1)
        made: Any = position
        self.slice_encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, dim), nn.GELU(), nn.Linear(dim, dim))
        self.aggregator = SliceAggregator(dim, depth=2, heads=4, dim_head=16, hidden_dim=2 * dim, dropout=0.0, position=made)

    def embed_slices(self, stacks: Tensor, valid: Tensor | None = None) -> Tensor:
        rows: Tensor = self.slice_encoder(stacks.flatten(0, 1)).reshape(*stacks.shape[:2], -1)
        return rows if valid is None else rows.masked_fill(~valid[..., None], 0.0)

    def parts(self) -> dict[str, Part]:
        return {"joint": Part(self, {}, prefix="")}


def noise_views(
    generator: torch.Generator, batch: int, *, fixed_n: bool, steps_mm: tuple[float, float], stretch: float = 1.0
) -> Views:
    """Two views of noise, fresh in each view; N and the step between slices are those of the stack.

    Args:
        generator: Of everything.
        batch: Stacks.
        fixed_n: All have `SLICES` slices, else 4 to `SLICES`.
        steps_mm: Range of the step.
        stretch: Largest factor by which positions of a view are stretched or shrunk, log-uniform.
    """
    x = torch.randn(batch, 2, SLICES, 1, SIDE, SIDE, generator=generator)
    n = torch.randint(4, SLICES + 1, (batch,), generator=generator)
    if fixed_n:
        n = torch.full_like(n, SLICES)
    step = steps_mm[0] * (steps_mm[1] / steps_mm[0]) ** torch.rand(batch, 1, generator=generator)
    factor = torch.exp((2 * torch.rand(batch, 2, generator=generator) - 1) * math.log(stretch))
    there = torch.arange(SLICES) < n[:, None]
    valid = there[:, None, :, None, None].expand(-1, 2, -1, SIDE, SIDE)
    depth = (step * factor)[..., None] * torch.arange(SLICES)
    data = {"stack": x, "stack_depth": depth, "stack_share": depth / depth[..., -1:].clamp_min(1e-6)}
    return Views(data, ViewsMeta("noise", "mri", torch.arange(batch), {}, {}, {"stack": valid}, ()))


def play(arm: str, *, seed: int, steps: int, batch: int, prototypes: int, lr: float = 3e-3) -> dict[str, float]:
    """Train on fresh noise; return the loss of the last fifth of the steps over ln K, and that of new stacks."""
    options = dict(ARMS[arm])
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    objective = IntraInterClustering(
        NoiseEncoder(options.pop("position")),
        view_specs={"stack": ViewSpec("clip", (SLICES, SIDE, SIDE), None, 2)},
        weights={"inter": 1.0},
        inter_prototypes=prototypes,
        freeze_prototypes=0,
        standardise=False,
        alarm={"steps": 10 * steps},
    )
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses, sharpness = [], 0.0
    for step in range(steps):
        ctx = StepContext(step=step)
        parts = objective(noise_views(generator, batch, **options), ctx)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        schedule.step()
        objective.after_step(ctx)
        losses.append(float(parts["loss"].detach()))
        sharpness = float(parts["inter_target_sharpness"])
    last = losses[-max(steps // 5, 1) :]
    return {"loss_over_ln_k": sum(last) / len(last) / math.log(prototypes), "target_sharpness": sharpness}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=3)
    options_parser.add_argument("--steps", type=int, default=400)
    options_parser.add_argument("--batch", type=int, default=64)
    options_parser.add_argument("--prototypes", type=int, default=8)
    options = options_parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        for seed in range(options.repeats):
            found = play(arm, seed=seed, steps=options.steps, batch=options.batch, prototypes=options.prototypes)
            rows.append({"positions": arm, "seed": seed, **found})
    checks = []
    for arm in ARMS:
        worst = min(row["loss_over_ln_k"] for row in rows if row["positions"] == arm)
        checks.append(Check(f"{arm}: loss / ln K, lowest seed", worst, 1 - MARGIN))
    notes = ["a check that is missed means a shortcut: the loss fell below ln K although views share no content"]
    return finish(Result("position_shortcut", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
