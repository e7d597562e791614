"""A few training steps on one or several processes, whose results must be the same.

python -m tests.objectives.clustering_processes OUT writes OUT/<rank>.pt; started by torchrun, it shares each batch over the processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize

from medssl.layers.sinkhorn import gather_rows, rank, sinkhorn, sum_ranks, world_size
from medssl.layers.spherical_kmeans import spherical_kmeans
from medssl.objectives.intra_inter_clustering import IntraInterClustering
from medssl.types import StepContext
from tests.objectives.stacks import SPECS, FakeStackEncoder, make_views

BATCH = 6


def play_functions() -> dict[str, Any]:
    """Sinkhorn on uneven shares, k-means."""
    torch.manual_seed(0)
    scores = normalize(torch.randn(11, 16), dim=1) @ normalize(torch.randn(5, 16), dim=1).T
    cut = 3 if world_size() > 1 else 11
    mine = scores[:cut] if rank() == 0 else scores[cut:]
    items = normalize(torch.randn(301, 6), dim=1)
    found = spherical_kmeans(items, 9, torch.Generator().manual_seed(0))
    return {
        "sinkhorn": gather_rows(sinkhorn(mine)),
        "empty": gather_rows(sinkhorn(scores if rank() == 0 else scores[:0])),
        "centroids": found.centroids,
        "labels": found.labels,
        "objective": torch.tensor(found.objective),
    }


def play_objective(mode: str) -> dict[str, Any]:
    """Six steps of stacks and images, a clustering every other step."""
    torch.manual_seed(0)
    queues = {"intra_queue": 25, "inter_queue": 7} if mode == "swav" else {}
    objective = IntraInterClustering(
        FakeStackEncoder(),
        view_specs=SPECS,
        items=36,
        mode=mode,
        intra_prototypes=6,
        inter_prototypes=[3, 4],
        freeze_prototypes=0,
        standardise=False,
        **queues,  # type: ignore[arg-type]
    )
    model: nn.Module = objective
    if world_size() > 1:
        model = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
    optimiser = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.05)
    share = BATCH // world_size()
    losses, monitors = [], []
    for step in range(6):
        if step % 2 == 0:
            objective.on_epoch(StepContext(step=step))
        kind = "image" if step == 3 else "stack"
        views = make_views(kind, share, first=BATCH * step + rank() * share)
        totals = {name: float(sum_ranks(count.double())) for name, count in objective.denominators(views).items()}
        ctx = StepContext(step=step, rank=rank(), world_size=world_size(), totals=totals)
        parts = model(views, ctx)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        objective.after_step(ctx)
        losses.append(sum_ranks(parts["loss"].detach()) / world_size())
        monitors.append(torch.stack([parts[name].detach() for name in sorted(parts) if "loss" not in name]))
    return {"losses": torch.stack(losses), "monitors": torch.cat(monitors), **objective.state_dict()}


def play() -> dict[str, Any]:
    """Everything, by name."""
    results = {"functions": play_functions(), "swav": play_objective("swav"), "deepcluster": play_objective("deepcluster")}
    return {f"{part}.{name}": value for part, values in results.items() for name, value in values.items()}


def main() -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.save(play(), Path(sys.argv[1]) / f"{rank()}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
