"""A few steps of the video objectives on one or several processes, whose results must be the same.

python -m tests.objectives.video_processes OUT writes OUT/<rank>.pt; started by torchrun, it shares each batch over the processes.
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
from medssl.objectives.cluster_distillation import ClusterDistillation
from medssl.objectives.relative_speed import RelativeSpeed
from medssl.objectives.video_mae import VideoMAE
from medssl.training.ema import update_ema
from medssl.types import StepContext
from tests.objectives.clips import clip_views, encoder, specs

BATCH = 4
SMALL: dict[str, Any] = {"head_prototypes": 12, "head_hidden": 16, "bottleneck": 8, "decoder_dim": 24, "decoder_depth": 1}


def build(name: str) -> tuple[Any, int]:
    """Return an objective, and how many views of an item it takes."""
    torch.manual_seed(0)
    if name == "cluster_distillation":
        small = {**SMALL, "prototypes": 3, "frames": 2, "masked_views": 2, "mask_ratio": 0.5}
        return ClusterDistillation(encoder(), view_specs=specs(), **small), 1
    if name == "video_mae":
        return VideoMAE(encoder(), view_specs=specs(), mask_ratio=0.5, decoder_dim=24, decoder_depth=1), 1
    return RelativeSpeed(encoder(), view_specs=specs(3), dim=8, queue=20), 3


def play_one(name: str, steps: int = 3) -> dict[str, Any]:
    """A few steps, each item's padding of its own, so that counts differ between processes."""
    objective, count = build(name)
    model: nn.Module = objective.train()
    if world_size() > 1:
        model = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)
    optimiser = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    share = BATCH // world_size()
    losses, monitors = [], []
    for step in range(steps):
        views = clip_views(share, count=count, first=BATCH * step + rank() * share, step=step, sector=True, short=True)
        if rank() == 0:
            views.meta.valid["clip"][0, :, 2:] = False
        totals = {key: float(sum_ranks(value.double())) for key, value in objective.denominators(views).items()}
        schedules = objective.schedules(step, steps) if hasattr(objective, "schedules") else {}
        ctx = StepContext(step=step, rank=rank(), world_size=world_size(), totals=totals, schedules=schedules)
        parts = model(views, ctx)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        if hasattr(objective, "ema_pairs"):
            for student, teacher, schedule in objective.ema_pairs():
                update_ema(student, teacher, schedules[schedule])
            objective.after_step(ctx)
        losses.append(sum_ranks(parts["loss"].detach()) / world_size())
        if name == "cluster_distillation":
            kept = sorted(key for key in parts if key.startswith("cluster_") or key.endswith("_spread"))
            monitors.append(torch.stack([parts[key].detach() for key in kept]))
    return {"losses": torch.stack(losses), "monitors": torch.stack(monitors or losses), **objective.state_dict()}


def play() -> dict[str, Any]:
    """Everything, by name."""
    names = ("cluster_distillation", "video_mae", "relative_speed")
    return {f"{name}.{key}": value for name in names for key, value in play_one(name).items()}


def main() -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.save(play(), Path(sys.argv[1]) / f"{rank()}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
