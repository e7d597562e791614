"""Balanced soft assignments by Sinkhorn-Knopp, over one micro-batch on all processes.

Reference:
    Cuturi 2013, "Sinkhorn distances"; Caron et al. 2020 (SwAV), section 3.1 and equation 3, for targets of a clustering objective.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

MIN_EPSILON = 0.025
"""exp(-2 / 0.025) = 2e-35: below it cosines underflow float32 after the largest one was subtracted."""


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_ranks(x: Tensor) -> Tensor:
    """Return the sum over all processes, without gradient; `x` itself is left alone."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def max_ranks(x: Tensor) -> Tensor:
    """Return the largest value over all processes, without gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all processes in rank order, without gradient; every process may bring another number of rows.

    Args:
        x: (M, ...), alike on all processes but for M.

    Returns:
        (sum of M, ...).
    """
    if world_size() == 1:
        return x.detach()
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    dist.all_reduce(counts)
    rows = counts.tolist()
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, rows)])


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Turn scores into soft assignments that use all prototypes about equally.

    Q = exp(scores / epsilon); then `iterations` times: every prototype's mass over all samples becomes B / K, every sample's mass
    becomes 1. B counts the samples of all processes, and the sums run over all of them, so that two processes give what one gives.
    Computed in float32 (float64 stays), outside autocast; the largest score is subtracted first, since exp(1 / 0.05) = 4.9e8.

    Args:
        scores: (M, K) cosines of this process's samples with the prototypes; M may differ between processes and be 0.
        epsilon: Entropy weight, at least 0.025; small is sharp.
        iterations: Iterations.

    Returns:
        (M, K), rows sum to 1; no gradient.
    """
    if epsilon < MIN_EPSILON:
        raise ValueError(
            f"epsilon is {epsilon}; accepted: {MIN_EPSILON} or more, below it float32 underflows; 0.03 to 0.05 is usual"
        )
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        largest = scores.max() if scores.numel() else scores.new_full((), float("-inf"))
        largest = max_ranks(largest)
        count = sum_ranks(torch.tensor(float(len(scores)), dtype=scores.dtype, device=scores.device))
        q = torch.exp((scores - largest) / epsilon)
        q = q / sum_ranks(q.sum())
        for _ in range(iterations):
            mass = sum_ranks(q.sum(dim=0))  # (K,)
            q = q / mass.clamp_min(torch.finfo(q.dtype).tiny) / q.shape[1]
            q = q / q.sum(dim=1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny) / count
        return q * count
