"""What this machine can do, and what a recipe would cost on it: measured, not looked up."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from medssl import build, recipe_checks
from medssl.data_sources import make_views, random_views
from medssl.errors import RequestError
from medssl.recipe import PretrainRecipe, Recipe
from medssl.training.run_folder import facts_of_machine
from medssl.types import StepContext, Views

EXTRAS = {"dicom": ("openjpeg", "rle", "jpeg_ls"), "onnx": ("onnx", "onnxscript", "onnxruntime"), "test": ("pytest",)}


def machine() -> dict[str, Any]:
    """Return cores, memory, GPUs, versions and extras in one flat table."""
    facts = facts_of_machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    table: dict[str, Any] = {
        "cpu": facts["hardware"]["cpu"],
        "cores": facts["hardware"]["cores"],
        "memory_gib": round(memory, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "gpu": facts["hardware"]["gpu"] or "none: everything runs on the CPU, slower",
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        table["gpu_memory_gib"] = f"{free / 2**30:.0f} free of {total / 2**30:.0f}"
    table.update({f"{name} version": value for name, value in facts["versions"].items()})
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        table[f"extra {extra}"] = f'missing {", ".join(missing)}: pip install "medssl[{extra}]"' if missing else "installed"
    return table


def predict(raw: Mapping[str, Any], steps: int = 3) -> dict[str, Any]:
    """Run a few steps of a recipe on random images and extrapolate; data reading is not included.

    Args:
        raw: A pretraining recipe; its index is not opened.
        steps: Measured steps, after one that warms up.

    Returns:
        Parameters, seconds per optimiser step, hours in all, and memory.
    """
    recipe = Recipe.parse(raw)
    if not isinstance(recipe, PretrainRecipe):
        raise RequestError(f"doctor predicts pretraining; this is a {recipe.kind} recipe")
    recipe_checks.check(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective, encoders = build.build_objective(recipe)
    objective.to(device).train()
    for encoder in encoders:
        encoder.checkpoint_blocks = recipe.train.checkpoint_blocks
    micro_steps, micro = build.loop_settings(recipe).micro_steps(1)
    maker = make_views(next(iter(recipe.sources.values())).views)
    views = random_views(maker, micro, encoders[0].in_channels, device)
    stages = build.build_stages(recipe)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0)
    seconds = [one_step(objective, views, optimiser, recipe.train.precision, device) for _ in range(steps + 1)][1:]
    per_step = statistics.median(seconds) * micro_steps
    total = sum(stage.steps for stage in stages)
    return {
        "device": device.type,
        "parameters_million": round(sum(p.numel() for p in objective.parameters()) / 1e6, 2),
        "steps": total,
        "batch": recipe.train.batch,
        "seconds_per_step": round(per_step, 3),
        "predicted_hours": round(per_step * total / 3600, 2),
        "peak_memory_gib": round(peak_memory(device), 2),
        "note": "measured on random images of the recipe's size; reading and augmentation come on top",
    }


def one_step(objective: Any, views: Views, optimiser: Any, precision: str, device: torch.device) -> float:
    """Time one forward, backward and optimiser step in seconds."""
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = objective(views, StepContext())["loss"]
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process so far in GiB: of the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
