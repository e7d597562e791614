"""Processes: torchrun, SLURM or a single one; DDP or FSDP2; the few collectives the loop needs."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl.errors import RequestError


@dataclass(frozen=True)
class World:
    """This process among all.

    Args:
        rank: From 0.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0


def environment() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's or SLURM's variables; (0, 1, 0) without either."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        if "MASTER_ADDR" not in env:
            raise RequestError(
                "SLURM started several tasks but MASTER_ADDR is not set; add "
                "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500 to the job"
            )
        env.setdefault("MASTER_PORT", "29500")
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def start() -> World:
    """Join the process group when there is one, and choose the device."""
    rank, size, local_rank = environment()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not joined():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(hours=2))
    return World(rank=rank, size=size, device=device)


def joined() -> bool:
    """Tell whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def stop() -> None:
    """Leave the process group, and end its threads."""
    if joined():
        # a wrapped model lies in cycles, and while it is there gloo's threads live on; one that wakes while the process exits aborts it
        gc.collect()
        dist.destroy_process_group()


def drops_at_random(model: nn.Module) -> bool:
    """Tell whether a model has dropout or drop path: noise drawn per process, so that another number of processes draws another."""
    for module in model.modules():
        shares = [getattr(module, name, 0.0) for name in ("drop_prob", "dropout", "drop_rate")]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            shares.append(module.p)
        if any(isinstance(share, float) and share > 0 for share in shares):
            return True
    return False


def sum_over_ranks(values: Mapping[str, float | Tensor], world: World) -> dict[str, float]:
    """Add up named scalars over all processes, in float64; every rank must give the same names in the same order."""
    if not values:
        return {}
    vector = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=world.device).detach() for v in values.values()])
    if world.size > 1:
        dist.all_reduce(vector)
    return dict(zip(values, vector.tolist()))


def any_rank(flag: bool, world: World) -> bool:
    """True on all ranks when the flag is set on any."""
    return sum_over_ranks({"flag": float(flag)}, world)["flag"] > 0 if world.size > 1 else flag


def broadcast(value: Any, world: World) -> Any:
    """Return rank 0's value on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


@torch.no_grad()
def average_running_statistics(model: nn.Module, world: World) -> None:
    """Give the batch norms of all processes the mean of their running statistics; all ranks must call.

    Training does not look at them, and each process counts its own share of the batches. What is saved, probed or resumed must not be the
    view of one rank, and must be the same on all.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if world.size == 1 or not norms:
        return
    rows = [row for norm in norms for row in (norm.running_mean, norm.running_var) if row is not None]
    flat = torch.cat([row.double() for row in rows])
    dist.all_reduce(flat)
    for row, mean in zip(rows, torch.split(flat / world.size, [len(row) for row in rows])):
        row.copy_(mean)


def choose_strategy(strategy: str, world: World) -> str:
    """Resolve `auto`: DDP with several processes, nothing with one. FSDP with one process is `none` too."""
    if world.size == 1:
        return "none"
    return "ddp" if strategy == "auto" else strategy


def wrap(objective: nn.Module, strategy: str, world: World, *, blocks: Iterable[nn.Module], find_unused: bool) -> nn.Module:
    """Wrap the objective, and nothing else.

    Args:
        objective: The module whose forward is the only entry point.
        strategy: `none`, `ddp` or `fsdp`.
        world: The processes.
        blocks: Encoder blocks, each sharded on its own under FSDP.
        find_unused: True exactly when a recipe has several sources.
    """
    if strategy == "none":
        return objective
    if strategy == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; the new name still syncs at the start, and torch 2.11 does not know it
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                objective, device_ids=ids, broadcast_buffers=False, find_unused_parameters=find_unused, gradient_as_bucket_view=True
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def gradient_sync(model: nn.Module, strategy: str, last: bool) -> AbstractContextManager[Any]:
    """Return a context in which gradients are exchanged only in the last micro-step."""
    if strategy == "ddp" and not last:
        return model.no_sync()  # type: ignore[operator, no-any-return]
    if strategy == "fsdp":
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    return nullcontext()


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor on every rank; a plain tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
