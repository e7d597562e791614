"""Card video-objectives C: is the clip of the same playback speed ranked above that of another one?

    python -m benchmarks.relative_speed_toy

Rings that beat, every one with a period of its own, so that a speed alone says nothing; views of 16 frames at one or two times the speed,
started anywhere. The motion term alone. Held out: rings, the same standing still (a tie is half), and with frames in any order.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import Check, Result, finish, parser
from medssl.encoders.video_vit import VideoViT
from medssl.objectives.relative_speed import RelativeSpeed
from medssl.seeding import counter_rng
from medssl.training.ema import update_ema
from medssl.training.schedules import warmup_cosine
from medssl.types import DrawKey, StepContext, Views, ViewsMeta, ViewSpec

SIZE = (16, 16, 16)
SPECS = {"clip": ViewSpec("clip", SIZE, None, 3)}
RANKED, CHANCE = 0.95, (0.4, 0.6)
"""Smallest accuracy on rings; where that of shuffled frames must lie."""


def triple(rng: np.random.Generator, motion: str) -> np.ndarray:
    """Return three views (3, T, H, W) of one ring: two of one speed, one of the other."""
    y, x = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[2]), indexing="ij")
    centre, radius = rng.uniform(6.5, 8.5, 2), rng.uniform(4, 5)
    away = np.hypot(y - centre[0], x - centre[1])
    period, beat = rng.uniform(9, 16), rng.uniform(0.25, 0.4)  # no clip shows less than a beat, none more than four
    speeds = (1, 1, 2) if rng.random() < 0.5 else (2, 2, 1)
    views = []
    for speed in speeds:
        times = rng.uniform(0, period) + speed * np.arange(SIZE[0])
        if motion == "shuffled":
            times = rng.permutation(times)
        radii = radius * (1 + (0 if motion == "still" else beat) * np.sin(2 * np.pi * times / period))
        views.append(np.exp(-0.5 * ((away[None] - radii[:, None, None]) / 1.2) ** 2))
    return np.stack(views).astype(np.float32)


def batch(rng: np.random.Generator, count: int, motion: str = "beating", step: int = 0) -> Views:
    """Return views (B, 3, T, 1, H, W)."""
    x = torch.from_numpy(np.stack([triple(rng, motion) for _ in range(count)]))[:, :, :, None]
    valid = {"clip": torch.ones(count, 3, *SIZE, dtype=torch.bool)}
    keys = tuple(DrawKey(0, step, n) for n in range(count))
    return Views({"clip": (x - 0.2) / 0.3}, ViewsMeta("toy", "ultrasound", torch.arange(count), {}, {}, valid, keys))


def play(seed: int, *, steps: int = 800, size: int = 32, lr: float = 1e-3, held_out: int = 400) -> dict[str, float]:
    """Train one seed and rank held-out rings."""
    torch.manual_seed(seed)
    encoder = VideoViT(image_size=SIZE, patch_size=8, hidden_size=64, num_layers=2, num_heads=4)
    objective = RelativeSpeed(encoder, view_specs=SPECS, weights={"motion": 1}, dim=32, key_momentum=0.9).train()
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(step, steps=steps, base=lr, warmup=50)
        loss = objective(batch(counter_rng(seed, step, "rings"), size, step=step), StepContext(step=step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for student, slow, name in objective.ema_pairs():
            update_ema(student, slow, objective.schedules(step, steps)[name])
    objective.eval()
    found = {}
    for motion in ("beating", "still", "shuffled"):
        with torch.no_grad():
            parts = objective(batch(counter_rng(seed, "held out"), held_out, motion), StepContext())
        found[motion] = float(parts["speed_accuracy"])
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options_parser.add_argument("--steps", type=int, default=800)
    options_parser.add_argument("--held-out", type=int, default=400)
    options_parser.add_argument("--threads", type=int, default=1)
    options = options_parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows, checks = [], []
    for seed in options.seeds:
        begin = time.perf_counter()
        found = play(seed, steps=options.steps, held_out=options.held_out)
        rows.append({"seed": seed, **found, "seconds": time.perf_counter() - begin})
        checks.append(Check(f"seed {seed}: rings ranked by speed", found["beating"], RANKED))
        checks.append(Check(f"seed {seed}: still rings, off a half", abs(found["still"] - 0.5), 0.0, at_least=False))
        checks.append(Check(f"seed {seed}: shuffled frames", found["shuffled"], CHANCE[1], at_least=False))
    notes = ["accuracy: share of held-out triples whose clip of the same speed has the higher cosine; chance is a half"]
    return finish(Result("relative_speed_toy", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
