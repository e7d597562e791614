"""A few steps of alice on one or several processes, whose results must be the same.

python -m tests.objectives.alice_processes OUT writes OUT/<rank>.pt; started by torchrun, it shares each batch over the processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medssl.layers.sinkhorn import rank, sum_ranks, world_size
from medssl.training.ema import update_ema
from medssl.types import StepContext
from tests.objectives.pairs import make_alice, make_pairs

BATCH = 4
WEIGHTS = [1.0, 0.5, 0.0, 0.75]


def play(name: str) -> dict[str, Any]:
    """Four steps with teacher, centres and pair weights."""
    objective = make_alice(name, frozen_epochs=0)
    model: nn.Module = objective
    if world_size() > 1:
        model = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)  # finds no unused parameter, or hangs
    optimiser = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    share = BATCH // world_size()
    losses = []
    for step in range(4):
        first = rank() * share
        views = make_pairs(name, share, seed=step, first=first, weights=WEIGHTS[first : first + share])
        totals = {key: float(sum_ranks(count.double())) for key, count in objective.denominators(views).items()}
        ctx = StepContext(step=step, rank=rank(), world_size=world_size(), totals=totals, schedules=objective.schedules(step, 4))
        parts = model(views, ctx)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        for student, teacher, schedule in objective.ema_pairs():
            update_ema(student, teacher, ctx.schedules[schedule])
        objective.after_step(ctx)
        losses.append(torch.stack([sum_ranks(parts["loss"].detach()) / world_size(), parts["cls_spread"]]))
    return {"losses": torch.stack(losses), **objective.state_dict()}


def main() -> None:
    """Play under torchrun."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)  # in single precision four steps already drift apart on some processors
    for name in ("segresnet3d", "vit3d"):
        torch.save(play(name), Path(sys.argv[1]) / f"{name}_{rank()}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
