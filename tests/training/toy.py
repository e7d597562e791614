"""A toy run of the real loop: tiny MAE on random volumes, startable as a program for the tests that kill or distribute it.

python -m tests.training.toy OUT [steps] [--resume] [--strategy ddp|fsdp] [--kill-at N] [--signal-at N] [--micro M]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.vit3d import ViT3D
from medssl.objectives.mae import MAE
from medssl.objectives.mae_cnn import MAECNN
from medssl.seeding import counter_rng
from medssl.training import distributed
from medssl.training.loop import Callback, train
from medssl.training.optim import OptimSettings
from medssl.training.run_folder import RunFolder
from medssl.training.settings import LoopSettings, Stage
from medssl.types import DrawKey, Views, ViewsMeta

SIZE = (16, 24, 8)
PATCH = 8


class ToySource:
    """Random volumes and masks, a pure function of the key. Some voxels are invalid, so that denominators differ between samples."""

    domain = "mri"

    def __init__(self, name: str = "toy", weight: float = 1.0, items: int = 32) -> None:
        self.name = name
        self.weight = weight
        self.items = items

    def __len__(self) -> int:
        return self.items

    def fetch(self, keys: list[DrawKey]) -> list[Any]:
        rows = []
        for key in keys:
            rng = counter_rng(key.seed, key.step, key.position, self.name)
            ramp = np.linspace(0, rng.uniform(1, 3), SIZE[0])[:, None, None] + rng.normal(0, 0.3, SIZE)
            valid = np.ones(SIZE, dtype=bool)
            valid[: int(rng.integers(0, 8))] = False
            mask = np.zeros(6, dtype=bool)
            mask[rng.permutation(6)[:4]] = True
            rows.append((ramp.astype(np.float32), valid, mask.reshape(2, 3, 1), key))
        return rows

    def views(self, fetched: list[Any], device: torch.device) -> Views:
        images = torch.from_numpy(np.stack([row[0] for row in fetched]))[:, None, None].to(device)
        valid = torch.from_numpy(np.stack([row[1] for row in fetched]))[:, None].to(device)
        masks = torch.from_numpy(np.stack([row[2] for row in fetched]))[:, None].to(device)
        keys = tuple(row[3] for row in fetched)
        ids = torch.tensor([key.position for key in keys])
        meta = ViewsMeta(self.name, self.domain, ids, {}, {}, {"volume": valid}, keys)
        return Views({"volume": images, "volume_mask": masks}, meta)


def make_objective(kind: str = "vit", seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    if kind == "vit":
        encoder: Any = ViT3D(image_size=SIZE, patch_size=PATCH, hidden_size=24, num_layers=2, num_heads=2, mlp_dim=48)
        return MAE(encoder, image_size=SIZE, decoder_dim=24, decoder_depth=1, decoder_heads=2), encoder
    encoder = SegResNet3D(init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
    return MAECNN(encoder, image_size=SIZE), encoder


def stage(steps: int, **changes: Any) -> Stage:
    optim = OptimSettings(lr=1e-3, warmup_steps=2, **changes)
    return Stage(name="main", steps=steps, optim=optim)


def run(
    out: Path,
    steps: int,
    *,
    resume: bool = False,
    kind: str = "vit",
    stages: list[Stage] | None = None,
    sources: dict[str, Any] | None = None,
    callbacks: list[Callback] | None = None,
    **settings: Any,
) -> str:
    torch.set_num_threads(1)
    world = distributed.start()
    folder = RunFolder(out)
    if world.is_main and not (resume and folder.exists()):
        folder.create("kind: toy\n", {})
    distributed.barrier(world)
    objective, encoder = make_objective(kind)
    defaults = {"batch": 4, "checkpoint_every": 4, "log_every": 1}
    return train(
        objective,
        sources or {"toy": ToySource()},
        stages=stages or [stage(steps)],
        settings=LoopSettings(**{**defaults, **settings}),
        run=folder,
        world=world,
        encoders=[encoder],
        callbacks=callbacks or [],
        items_hash="toy",
        resume=resume,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int, default=12, nargs="?")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--kind", default="vit")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--signal-at", type=int, default=-1)
    parser.add_argument("--signal", default="SIGTERM")
    parser.add_argument("--micro", type=int, default=None)
    args = parser.parse_args()

    class Deadly(ToySource):
        """Kills or signals its own process when a given step's views are made."""

        def views(self, fetched: list[Any], device: torch.device) -> Views:
            step = fetched[0][3].step
            if step == args.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == args.signal_at:
                os.kill(os.getpid(), getattr(signal, args.signal))
            return super().views(fetched, device)

    status = run(
        args.out,
        args.steps,
        resume=args.resume,
        kind=args.kind,
        sources={"toy": Deadly()},
        strategy=args.strategy,
        micro_batch=args.micro,
    )
    print(f"status {status}")
    distributed.stop()


if __name__ == "__main__":
    main()
