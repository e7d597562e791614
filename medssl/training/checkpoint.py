"""Resumable state: torch.distributed.checkpoint folders, written aside and renamed, the previous one never deleted first.

Nothing but `--resume` opens them, and only if they belong to the user: their metadata is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from medssl.errors import CheckpointError
from medssl.training.distributed import World, barrier, broadcast
from medssl.weights import disk_error, write_atomic

META = "meta.json"


def step_folders(folder: Path) -> list[Path]:
    """Return complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / META).is_file() and not path.name.endswith(".tmp"))


def save(folder: Path, step: int, model: nn.Module, optimiser: Optimizer, meta: Mapping[str, Any], keep: int, world: World) -> Path:
    """Write `step_<n>`: to a sibling first, then renamed; afterwards older ones beyond `keep` go.

    Args:
        folder: The run's `checkpoints` folder.
        step: Optimiser steps done.
        model: The wrapped objective.
        optimiser: Its optimiser, with state for every parameter.
        meta: JSON-able facts that `load` checks and returns.
        keep: Checkpoints to keep, this one included.
        world: The processes; all must call.

    Raises:
        StoreError: The disk is full or not writable; the previous checkpoint is untouched.
    """
    target = folder / f"step_{step:09d}"
    aside = folder / f"step_{step:09d}.tmp"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
    barrier(world)
    problem: str | None = None
    try:
        _write(aside, model, optimiser, world)
        if world.is_main:
            write_atomic(aside / META, json.dumps({**meta, "step": step}, indent=2).encode())
            if target.exists():
                shutil.rmtree(target)
            os.replace(aside, target)
    except (Exception, CheckpointException) as err:  # torch derives it from BaseException
        cause = _os_error(err)
        if cause is None:
            raise
        problem = str(disk_error(cause, aside))
    problem = broadcast(problem, world)
    if problem:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        from medssl.errors import StoreError

        raise StoreError(f"checkpoint at step {step} not saved: {problem}")
    if world.is_main:
        for old in step_folders(folder)[:-keep]:
            shutil.rmtree(old)
    barrier(world)
    return target


def _write(aside: Path, model: nn.Module, optimiser: Optimizer, world: World) -> None:
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimiser)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process without a process group is what we mean
        dcp_save(
            state,
            checkpoint_id=str(aside),
            no_dist=world.size == 1,
        )


def _os_error(err: BaseException) -> OSError | None:
    """Find an OSError behind torch's CheckpointException or inline-container errors."""
    seen: BaseException | None = err
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        for failure in getattr(seen, "failures", {}).values():
            inner = failure[0] if isinstance(failure, tuple) else failure
            if isinstance(inner, OSError):
                return inner
            if "file write failed" in str(inner) or "iostream" in str(inner):
                return OSError(28, "No space left on device")
        seen = seen.__cause__ or seen.__context__
    return None


def read_meta(path: Path) -> dict[str, Any]:
    """Read the facts of a checkpoint.

    Raises:
        CheckpointError: The folder belongs to another user, or is incomplete.
    """
    owner = path.stat().st_uid
    if hasattr(os, "getuid") and owner != os.getuid():
        raise CheckpointError(
            f"{path} belongs to user id {owner}, not to you: its metadata is a pickle and is opened only by its owner; "
            "use the weights (safetensors) of that run instead"
        )
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise CheckpointError(f"{path} is incomplete ({META}: {err}); delete it and resume from the one before") from err
    return meta


def load(path: Path, model: nn.Module, optimiser: Optimizer, world: World) -> None:
    """Load model and optimiser state in place, whatever the number of processes it was saved by.

    Raises:
        CheckpointError: A file is missing or cut short; nothing has been changed on disk.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimiser)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_load(
                state,
                checkpoint_id=str(path),
                no_dist=world.size == 1,
            )
    except (Exception, CheckpointException) as err:  # torch derives it from BaseException
        raise CheckpointError(
            f"{path} cannot be read ({type(err).__name__}): it is cut short or was changed; "
            f"delete that folder and resume again, which takes the checkpoint before it"
        ) from err
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimiser, state["optim"])


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """Return the whole state of the objective on every rank, keys free of wrapper prefixes."""
    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
