"""Spherical k-means: clusters of directions.

Reference:
    Dhillon and Modha 2001; Caron et al. 2020 (SwAV), appendix (DeepCluster-v2): 10 iterations, initialised with random items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medssl.layers.sinkhorn import rank, sum_ranks, world_size

CHUNK = 16384
"""Rows compared with all centroids at a time."""


@dataclass(frozen=True)
class Clusters:
    """Outcome of `spherical_kmeans`.

    Args:
        centroids: (k, E) unit rows, k at most the number of items.
        labels: (M,) int64, nearest centroid of every item.
        objective: Mean cosine of items with their centroid: at the start and after each iteration; never falls.
    """

    centroids: Tensor
    labels: Tensor
    objective: list[float]


@torch.no_grad()
def spherical_kmeans(x: Tensor, k: int, generator: torch.Generator, *, iterations: int = 10) -> Clusters:
    """Cluster directions.

    Processes share out the rows; sums are reduced in float64, so that all have the same centroids.

    Args:
        x: (M, E) rows of length 1, M of 1 or more, the same on all processes.
        k: Clusters wanted; fewer items give fewer clusters.
        generator: CPU generator, in the same state on all processes; draws the items that are the first centroids.
        iterations: Iterations. Empty clusters keep their centroid.
    """
    if x.ndim != 2 or len(x) == 0 or k < 1:
        raise ValueError(f"k-means of {tuple(x.shape)} with k = {k}; accepted: (M, E) with at least one row, and k of 1 or more")
    k = min(k, len(x))
    first = torch.randperm(len(x), generator=generator)[:k].to(x.device)
    centroids = nn.functional.normalize(x[first], dim=1)
    mine = x[rank() :: world_size()]
    objective = []
    for _ in range(iterations):
        labels, best = nearest(mine, centroids)
        sums = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device).index_add_(0, labels, mine.double())
        total = sum_ranks(torch.cat([sums.flatten(), best.double().sum()[None]]))
        objective.append(float(total[-1]) / len(x))
        sums = total[:-1].reshape(sums.shape)
        norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        centroids = torch.where(norm > 1e-12, (sums / norm.clamp_min(1e-12)).to(x.dtype), centroids)
    labels, best = nearest(x, centroids)
    objective.append(float(best.double().mean()))
    return Clusters(centroids, labels, objective)


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of and the cosine with the nearest centroid.

    Args:
        x: (M, E) unit rows.
        centroids: (k, E) unit rows.

    Returns:
        (M,) int64 and (M,).
    """
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.int64, device=x.device), x.new_zeros(0)
    best, labels = zip(*((rows @ centroids.T).max(dim=1) for rows in torch.split(x, CHUNK)))
    return torch.cat(labels), torch.cat(best)
