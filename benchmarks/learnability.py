"""Sanity experiment A10.4 of the method card: how well a small `mae` learns phantoms, beside a voxel-wise mean atlas.

    python -m benchmarks.learnability

Sizes are the card's (32^3, patch 8, encoder 128 x 4, decoder 64 x 2, AdamW 1e-3, batch 16); `tests/objectives` bounds the same runs.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from medssl.encoders.vit3d import ViT3D
from medssl.objectives.mae import MAE
from medssl.phantoms.body import toy_phantoms
from medssl.seeding import counter_rng
from medssl.training.run_folder import facts_of_machine
from medssl.types import StepContext, Views, ViewsMeta
from medssl.views.masks import block_mask, upsample_mask
from medssl.weights import write_atomic

SIZE, PATCH, GRID = (32, 32, 32), 8, (4, 4, 4)
RUNS = ((128, 300, "masked"), (128, 300, "all"), (512, 2000, "masked"))


def views_of(images: Tensor, step: int) -> Views:
    """Return (B, 1, 32, 32, 32) images as views with 75 % of their patches hidden."""
    masks = [torch.from_numpy(block_mask(GRID, 0.75, counter_rng(0, step, i))) for i in range(len(images))]
    valid = torch.ones(len(images), 1, *SIZE, dtype=torch.bool)
    meta = ViewsMeta("toy", "mri", torch.arange(len(images)), {}, {}, {"volume": valid}, ())
    return Views({"volume": images[:, None], "volume_mask": torch.stack(masks)[:, None]}, meta)


@cache
def phantoms(count: int) -> tuple[Tensor, Tensor]:
    """Return `count` phantoms to train on and 32 held out."""
    images = torch.from_numpy(toy_phantoms(count + 32, seed=0))
    return images[:count], images[count:]


def train(count: int, steps: int, region: str) -> tuple[float, float, float]:
    """Train as the card says and return masked MSE, visible MSE and the mean-atlas predictor's masked MSE on 32 held-out phantoms."""
    torch.manual_seed(0)
    images, held_out = phantoms(count)
    encoder = ViT3D(image_size=SIZE, patch_size=PATCH, hidden_size=128, num_layers=4, num_heads=4)
    objective = MAE(encoder, image_size=SIZE, decoder_dim=64, decoder_depth=2, decoder_heads=4, recon_region=region)  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        batch = images[torch.randint(count, (16,), generator=generator)]
        loss = objective(views_of(batch, step), StepContext(step=step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    views = views_of(held_out, 10**6)
    objective.recon_region = "masked"
    with torch.no_grad():
        parts = objective(views, StepContext())
        atlas = (images.mean(dim=0) - held_out).square()
        hidden = upsample_mask(views["volume_mask"], SIZE)
    return float(parts["loss"]), float(parts["mse_visible"]), float(atlas[hidden].mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learnability.json")
    options = parser.parse_args(argv)
    rows = []
    for count, steps, region in RUNS:
        masked, visible, atlas = train(count, steps, region)
        print(f"| {steps} | {count} | {region} | {masked:.3f} | {atlas:.3f} | {visible / masked:.2f} |", flush=True)
        rows.append({"steps": steps, "phantoms": count, "region": region, "masked": masked, "visible": visible, "atlas": atlas})
    content = {"rows": rows, "seed": 0, "held_out": 32, **facts_of_machine()}
    write_atomic(options.out, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
