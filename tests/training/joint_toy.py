"""A toy run of the real loop on planes: stacks and pictures of volumes in memory, through the real samplers, sources and views.

python -m tests.training.joint_toy OUT NAME ... [--strategy ddp|fsdp] [--kill-at N] [--resume]

Each rank leaves OUT/<name>_<rank>.pt: the whole state of the objective, and the source of every step.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.encoders.image2d import Image2D
from medssl.encoders.slice_volume import SliceVolumeEncoder
from medssl.errors import StoreError
from medssl.objectives.global_local_contrast import GlobalLocalContrast
from medssl.objectives.graph_matching import GraphMatching
from medssl.objectives.intra_inter_clustering import IntraInterClustering
from medssl.sampling.planes import PlaneSampler, PlaneSource
from medssl.training import checkpoint, distributed
from medssl.training.loop import train
from medssl.training.optim import OptimSettings
from medssl.training.run_folder import RunFolder
from medssl.training.settings import LoopSettings, Stage
from medssl.types import DrawKey, ViewSpec
from medssl.views.planes import Planes, PlaneViews

SIZE = 32
BATCH = 4
CLUSTERING = ("swav", "deepcluster")
OBJECTIVES = (*CLUSTERING, "graph_matching", "global_local_contrast")
VIEWS: dict[str, Any] = {"count": 2, "area": (0.5, 1), "flip": (0, 0.5), "noise_std": 0.1, "contrast": (0.8, 1.25)}


@dataclass(frozen=True)
class Volume:
    """A store record with its voxels, which are noise, smooth along the slices."""

    series_id: str
    shape: tuple[int, ...]
    channels: int = 1
    kind: str = "volume"
    slice_axis: int | None = 2
    spacing_mm: tuple[float, ...] = (1.0, 1.0, 3.0)
    frame_times_ms: tuple[float, ...] | None = None
    stats: dict[str, float] = field(
        default_factory=lambda: {"mean": 0.0, "std": 1.0, "p00_5": -2.5, "p99_5": 2.5, "min": -4.0, "max": 4.0}
    )
    foreground: np.ndarray = field(default_factory=lambda: np.array([[16, 16, 0]], dtype=np.uint16))

    @property
    def voxel_mm(self) -> tuple[float, ...]:
        return self.spacing_mm

    @property
    def image(self) -> np.ndarray:
        rng = np.random.default_rng(int(self.series_id, 16))
        coarse = rng.normal(size=(self.channels, 8, 8, self.shape[2])).cumsum(axis=-1)
        coarse /= coarse.std() + 1e-6
        return np.repeat(np.repeat(coarse, self.shape[0] // 8, axis=1), self.shape[1] // 8, axis=2).astype(np.float32)


class MemoryReader:
    """What `PlaneSource` needs of a `StoreReader`."""

    def __init__(self, volumes: list[Volume]) -> None:
        self.volumes = {volume.series_id: volume for volume in volumes}

    def record(self, series_id: str) -> Volume:
        return self.volumes[series_id]

    def read_box(self, series_id: str, start: Any, size: Any) -> tuple[np.ndarray, np.ndarray]:
        window = tuple(slice(a, a + n) for a, n in zip(start, size))
        image = self.volumes[series_id].image[(slice(None), *window)]
        return image, np.ones(image.shape[1:], dtype=bool)


def source(name: str, volumes: dict[int, Volume], views: PlaneViews, batch: int = BATCH, **options: Any) -> PlaneSource:
    """A source of volumes in memory, by id."""
    reader: Any = MemoryReader(list(volumes.values()))
    sampler = PlaneSampler(name, sorted(volumes), lambda item: volumes[item], views.slices, batch=batch, **options)
    series = {item: volume.series_id for item, volume in volumes.items()}
    return PlaneSource(name, "mri", reader, series, sampler, views, item=Planes)


def volumes(first: int, count: int) -> dict[int, Volume]:
    """Volumes of 1 to 8 slices with ids from `first`."""
    return {item: Volume(f"{item:032x}", (32, 32, 1 + item % 8)) for item in range(first, first + count)}


def encoder_args(norm: str) -> dict[str, Any]:
    """A network with batch norm, or one that sees each picture by itself."""
    return {"model": "test_resnet" if norm == "batch" else "test_convnext"}


def build(name: str, seed: int = 0, norm: str = "batch", **changes: Any) -> tuple[Any, Any, dict[str, PlaneSource]]:
    """The objective, its encoder and the sources: 11 volumes as stacks, 9 as slices."""
    torch.manual_seed(seed)
    if name in CLUSTERING:
        slices = 6
        encoder: Any = SliceVolumeEncoder(
            slice_encoder=encoder_args(norm),
            aggregator={"depth": 1, "heads": 2, "dim_head": 8, "hidden_dim": 16, "dropout": 0.1 if norm == "batch" else 0.0},
            dim=16,
            chunk=8,
        )
        sources = {
            "stacks": source("stacks", volumes(0, 11), PlaneViews("stack", size=SIZE, slices=slices, **VIEWS), cover=(0.6, 1.0)),
            "slices": source(
                "slices", volumes(11, 9), PlaneViews("image", size=SIZE, local={"count": 2, "size": SIZE}, **VIEWS), foreground=0
            ),
        }
        specs: dict[str, ViewSpec] = {k: s for each in sources.values() for k, s in each.view_maker.specs.items()}  # type: ignore[attr-defined]
        queues = {"intra_queue": 40, "inter_queue": 9} if name == "swav" else {"places": 4}
        objective: Any = IntraInterClustering(
            encoder,
            view_specs=specs,
            items=20,
            mode=name,  # type: ignore[arg-type]
            intra_prototypes=6,
            inter_prototypes=[3, 4] if name == "swav" else [3, 15],  # more than there are stacks
            projector_dim=8,
            freeze_prototypes=2,
            **{**queues, **changes},  # type: ignore[arg-type]
        )
        return objective, encoder, sources
    encoder = Image2D(**encoder_args(norm))
    if name == "graph_matching":
        sources = {"slices": source("slices", volumes(0, 20), PlaneViews("image", size=SIZE, **VIEWS), batch=8, foreground=0)}
        # without noise and edges the matching is exact, whatever the order in which a process numbers its images
        how: dict[str, Any] = {} if norm == "batch" else {"noise": 0.0, "second_order": False}
        graph = GraphMatching(encoder, view_specs=sources["slices"].view_maker.specs, dim=8, nodes=4, neighbours=2, **how)  # type: ignore[attr-defined]
        return graph, encoder, sources
    wide = PlaneViews("image", size=64, count=2, contrast=(0.7, 1.3), brightness=0.3)
    sources = {"slices": source("slices", volumes(0, 20), wide, batch=8, partitions=4)}
    contrast = GlobalLocalContrast(encoder, view_specs=wide.specs, dim=8, hidden=16, decoder_blocks=3, decoder_width=8)
    return contrast, encoder, sources


def run(
    out: Path,
    name: str,
    steps: int = 14,
    *,
    resume: bool = False,
    norm: str = "batch",
    seed: int = 0,
    kill_at: int = -1,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train and return the state and the sources of the steps; `kill_at` makes reading for that step fail."""
    torch.set_num_threads(1)
    world = distributed.start()
    folder = RunFolder(out)
    if world.is_main and not (resume and folder.exists()):
        folder.create("kind: toy\n", {})
    distributed.barrier(world)
    objective, encoder, sources = build(name, seed, norm, **(changes or {}))
    used: dict[int, str] = {}
    for each in sources.values():
        original, made = each.fetch, each.views

        def fetch(keys: list[DrawKey], original: Any = original) -> Any:
            if keys[0].step == kill_at:
                raise StoreError("the disk went away")
            return original(keys)

        def views(fetched: Any, device: Any, made: Any = made) -> Any:
            batch = made(fetched, device)
            used[fetched[0].key.step] = batch.meta.source
            return batch

        each.fetch, each.views = fetch, views  # type: ignore[method-assign, assignment]
    # AdamW divides by the size of a gradient, so where that is near zero a rounding error becomes a step: not for comparing processes
    optim = OptimSettings(lr=1e-3, warmup_steps=2) if norm == "batch" else OptimSettings("sgd", lr=1e-2, warmup_steps=2)
    batch = BATCH if name in CLUSTERING else 8
    train(
        objective,
        sources,
        stages=[Stage("main", steps, optim)],
        settings=LoopSettings(**{"batch": batch, "checkpoint_every": 3, "log_every": 1, "workers": 0, **settings}),
        run=folder,
        world=world,
        encoders=[encoder],
        items_hash="toy",
        resume=resume,
    )
    state = {key: value.detach().clone() for key, value in checkpoint.gathered_state(objective).items()}
    return {"state": state, "sources": used}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        how: dict[str, Any] = {"strategy": args.strategy, "kill_at": args.kill_at, "resume": args.resume}
        try:
            found = run(args.out / name, name, norm="each", **how)
        except StoreError:
            assert args.kill_at >= 0
            continue
        torch.save(found, args.out / f"{name}_{distributed.environment()[0]}.pt")
    distributed.stop()
    left = threads_of_gloo()
    # torch's caches of sharded tensors keep the group under FSDP
    assert not left or args.strategy == "fsdp", f"{left} can abort the process while it exits"


def threads_of_gloo() -> list[str]:
    """Names of the threads that a process group has left; none where the system does not tell."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    main()
