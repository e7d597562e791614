"""What a run of the loop is told: its stages and how steps are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medssl.errors import RequestError
from medssl.training.optim import OptimSettings


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: For logs and checkpoints.
        steps: Optimiser steps.
        optim: Its optimiser.
        train: Patterns of parameter names that are trained.
        loss_weights: Passed to the objective.
    """

    name: str
    steps: int
    optim: OptimSettings
    train: Sequence[str] = ("*",)
    loss_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs; see `recipe.TrainSection`.

    Args:
        batch: Items per optimiser step over all processes and micro-steps.
        micro_batch: Items per forward pass and process; None means batch / processes.
        seed: Seed of everything.
        precision: `fp32` or `bf16` (autocast).
        strategy: `auto`, `ddp` or `fsdp`.
        workers: Threads that read ahead.
        compile: Compile each encoder block.
        checkpoint_blocks: Activation checkpointing of encoder blocks.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many to keep.
        log_every: Steps between lines of metrics.jsonl.
    """

    batch: int = 4
    micro_batch: int | None = None
    seed: int = 0
    precision: str = "fp32"
    strategy: str = "auto"
    workers: int = 2
    compile: bool = False
    checkpoint_blocks: bool = False
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10

    def micro_steps(self, world_size: int) -> tuple[int, int]:
        """Return (micro-steps, items per micro-step and rank).

        Raises:
            RequestError: The batch cannot be shared out evenly.
        """
        micro = self.micro_batch or max(self.batch // world_size, 1)
        if self.batch % (micro * world_size):
            raise RequestError(
                f"train.batch={self.batch} cannot be shared by {world_size} process(es) with micro_batch {micro}; "
                f"choose a batch that is a multiple of {micro * world_size}"
            )
        return self.batch // (micro * world_size), micro
