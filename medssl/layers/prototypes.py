"""Prototypes on the unit sphere, and what clustering objectives remember between steps: a queue, and a bank by item.

Queue and bank are persistent buffers. They are updated from values gathered over all processes in global order, so that they are the
same everywhere and a resumed run continues with the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medssl.layers.sinkhorn import rank, sum_ranks, world_size

UNLABELLED = -100


class Prototypes(nn.Module):
    """K unit directions; their cosines with embeddings are the scores.

    Args:
        dim: E.
        count: K.
        learned: Whether they are trained; those that are not are a buffer, which k-means writes.
    """

    def __init__(self, dim: int, count: int, *, learned: bool = True) -> None:
        super().__init__()
        if count < 2:
            raise ValueError(f"{count} prototypes; accepted: 2 or more")
        rows = nn.functional.normalize(torch.randn(count, dim), dim=1)
        self.weight: Tensor
        if learned:
            self.weight = nn.Parameter(rows)
        else:
            self.register_buffer("weight", rows)
        self.active: Tensor
        self.register_buffer("active", torch.tensor(count))

    @property
    def count(self) -> int:
        """K."""
        return int(self.weight.shape[0])

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every row length 1 again; called after each optimiser step."""
        self.weight.copy_(nn.functional.normalize(self.weight, dim=1))

    @torch.no_grad()
    def set(self, centroids: Tensor) -> None:
        """Take over centroids; with fewer than K, only those count until the next call."""
        self.weight[: len(centroids)] = centroids.to(self.weight.dtype)
        self.active.fill_(len(centroids))

    def forward(self, z: Tensor, *, frozen: bool = False) -> Tensor:
        """Score embeddings, in float32 or better.

        Args:
            z: (M, E) rows of length 1.
            frozen: Let the prototypes' gradient be zero, not missing.

        Returns:
            (M, K) cosines; -inf for prototypes that are not active.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            weight = self.weight.detach() + 0.0 * self.weight if frozen else self.weight
            scores = z @ weight.to(z.dtype).T
            off = torch.arange(scores.shape[1], device=z.device) >= self.active
            return scores.masked_fill(off, float("-inf"))


class EmbeddingQueue(nn.Module):
    """The latest embeddings of every target view, newest first.

    Args:
        length: Embeddings kept per view, over all processes.
        dim: E.
        views: Target views.
    """

    def __init__(self, length: int, dim: int, views: int = 2) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"a queue of {length} embeddings; accepted: 1 or more, or none at all")
        self.rows: Tensor
        self.filled: Tensor
        self.register_buffer("rows", torch.zeros(views, length, dim))
        self.register_buffer("filled", torch.tensor(0))

    def share(self, view: int) -> Tensor:
        """Return this process's share of the rows of a view, so that a sum over processes counts each row once."""
        return self.rows[view, : int(self.filled)][rank() :: world_size()]

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Take in the embeddings of one micro-batch.

        Args:
            rows: (views, M, E), those of all processes in global order.
        """
        length = self.rows.shape[1]
        self.rows.copy_(torch.cat([rows.flip(1).to(self.rows.dtype), self.rows], dim=1)[:, :length])
        self.filled.fill_(min(int(self.filled) + rows.shape[1], length))


class MemoryBank(nn.Module):
    """The last embedding of every item and its cluster labels, by global id.

    Args:
        items: Slots: one per item of the run, ids 0 to items - 1 (times the places per item, where an item has several).
        dim: E.
        heads: Clusterings.
        views: Banks; clustering h looks at bank h mod views.
    """

    def __init__(self, items: int, dim: int, heads: int = 1, views: int = 2) -> None:
        super().__init__()
        self.rows: Tensor
        self.filled: Tensor
        self.labels: Tensor
        self.register_buffer("rows", torch.zeros(views, items, dim))
        self.register_buffer("filled", torch.zeros(items, dtype=torch.bool))
        self.register_buffer("labels", torch.full((heads, items), UNLABELLED))

    @property
    def clustered(self) -> bool:
        """Whether any item has a label yet."""
        return bool((self.labels != UNLABELLED).any())

    @torch.no_grad()
    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Store embeddings; the last of a slot that comes twice stays.

        Args:
            slots: (M,) int64, in global order.
            rows: (views, M, E).
        """
        if len(slots) == 0:
            return
        if int(slots.max()) >= self.rows.shape[1] or int(slots.min()) < 0:
            raise ValueError(
                f"item ids run from {int(slots.min())} to {int(slots.max())}, the memory bank has {self.rows.shape[1]} slots; "
                "build it with the number of items of the run"
            )
        unique, inverse = torch.unique(slots, return_inverse=True)
        order = torch.arange(len(slots), device=slots.device)
        last = torch.zeros_like(unique).scatter_reduce_(0, inverse, order, "amax", include_self=False)
        self.rows[:, unique] = rows[:, last].to(self.rows.dtype)
        self.filled[unique] = True

    @torch.no_grad()
    def label(self, head: int, labels: Tensor) -> None:
        """Store the labels of the filled slots for one clustering.

        Args:
            head: Which clustering.
            labels: One per filled slot, in slot order.
        """
        self.labels[head].fill_(UNLABELLED)
        self.labels[head, self.filled] = labels


@torch.no_grad()
def usage(probabilities: Tensor) -> dict[str, Tensor]:
    """Describe how prototypes are used, over all processes.

    Args:
        probabilities: (M, K) soft assignments of this process, rows sum to 1.

    Returns:
        `entropy`, of the mean assignment, as a share of ln K: 1 when all prototypes are used alike, 0 when one takes everything.
        `sharpness`, 1 minus the mean entropy of single assignments as a share of ln K: 0 says uniform assignments, which teach nothing.
        `used`, prototypes that are the first choice of a sample, as a share of what is possible, min(samples, K).
    """
    probabilities = probabilities.float()
    k = probabilities.shape[1]
    own = -torch.xlogy(probabilities, probabilities).sum()
    hits = torch.zeros(k, device=probabilities.device)
    if len(probabilities):
        hits[probabilities.argmax(dim=1)] = 1.0
    total = sum_ranks(torch.cat([probabilities.sum(dim=0), hits, own[None], torch.tensor([float(len(probabilities))]).to(own)]))
    mass, hits, own, count = total[:k], total[k : 2 * k], total[2 * k], total[2 * k + 1].clamp_min(1)
    mean = mass / count
    return {
        "entropy": -torch.xlogy(mean, mean).sum() / math.log(k),
        "sharpness": 1 - own / count / math.log(k),
        "used": (hits > 0).sum() / count.clamp_max(k),
    }


def suggested_prototypes(items: int) -> int:
    """Return how many prototypes suit a small data set: a tenth of the items, 8 to 3,000."""
    return min(max(items // 10, 8), 3000)


def prototype_warning(samples: int, queue: int, prototypes: int) -> str | None:
    """Say when balanced assignments have too few samples to be anything but nearly uniform.

    Args:
        samples: Samples of a micro-batch over all processes.
        queue: Length of the queue.
        prototypes: K.

    Returns:
        A sentence, or None when there is at least one sample per prototype.
    """
    if samples + queue >= prototypes:
        return None
    much = (
        "; more than 50 prototypes per sample: targets are nearly uniform and teach little"
        if prototypes > 50 * (samples + queue)
        else ""
    )
    return (
        f"{prototypes} prototypes share {samples} samples and a queue of {queue}: under one sample per prototype{much}. "
        f"Take at most {samples + queue} prototypes, a queue of about {10 * prototypes}, or mode deepcluster"
    )


class StuckAlarm(nn.Module):
    """Notices a clustering loss that stays at ln K, the value of uniform predictions.

    Args:
        share: A smoothed loss above this share of ln K counts as stuck.
        epochs: Epochs in a row before the alarm.
        steps: Optimiser steps in a row before the alarm, since epochs of small data sets are short.
    """

    def __init__(self, *, share: float = 0.98, epochs: int = 5, steps: int = 1000) -> None:
        super().__init__()
        self.share, self.epochs, self.steps = share, epochs, steps
        self.smoothed: Tensor
        self.since: Tensor
        self.register_buffer("smoothed", torch.zeros((), dtype=torch.float64))
        self.register_buffer("since", torch.full((2,), -1))

    @torch.no_grad()
    def update(self, loss: float, log_k: float, step: int, epoch: int) -> bool:
        """Take in the loss of one step over all processes.

        Args:
            loss: The loss.
            log_k: ln K, or its mean over heads.
            step: Optimiser step.
            epoch: Epoch.

        Returns:
            Whether the loss has been stuck for too long.
        """
        fresh = int(self.since[0]) < 0
        relative = loss / log_k
        smoothed = relative if fresh else 0.95 * float(self.smoothed) + 0.05 * relative
        self.smoothed.fill_(smoothed)
        if fresh or smoothed < self.share:
            self.since.copy_(torch.tensor([step, epoch]))
        first_step, first_epoch = self.since.tolist()
        return smoothed >= self.share and epoch - first_epoch > self.epochs and step - first_step >= self.steps
