"""Do features of graph matching sort slices by organ? 20 nearest neighbours beside SimCLR (lvm-med card 9.7, at a size for a CPU).

    python -m benchmarks.matching_knn
    python -m benchmarks.matching_knn --model resnet18 --size 64 --items 20000 --epochs 30    on a GPU's machine: the card's size

The card asks for 20,000 mixed slices. Here slices are drawn: eight kinds of organ, told apart by shape alone, at any place, turn, size and
grey, blurred and in noise. Neighbours are found by cosine of the pooled frozen features, slices of one draw among those of another. SimCLR is
the `random` variant of `global_local_contrast` without a local term, with the same views, batches and steps; nothing of ImageNet is at hand,
so the baseline is the untrained encoder. `published` is graph matching without our residual and with noise of 1, as the paper trains it
from ImageNet's weights. Every arm and seed is kept in `--folder`: kill the script and start it again to go on.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.common import Check, Result, finish, kept, parser
from benchmarks.place_contrast import Encoder
from medssl.objectives.global_local_contrast import GlobalLocalContrast
from medssl.objectives.graph_matching import GraphMatching
from medssl.types import DrawKey, StepContext, Views, ViewsMeta, ViewSpec
from medssl.views.planes import Planes, PlaneViews

ORGANS = ("disc", "ring", "pair", "crescent", "three lobes", "four lobes", "bar", "cross")
ARMS = ("untrained", "simclr", "graph_matching", "published")
NEIGHBOURS, BEHIND_SIMCLR = 20, 0.01
NOISE = 0.25


def inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return where an organ of radius 1 at the origin lies, bool, for places (u, v)."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    found = {
        "disc": r < 0.85,
        "ring": (r < 1) & (r > 0.55),
        "pair": np.minimum(np.hypot(u - 0.55, v), np.hypot(u + 0.55, v)) < 0.45,
        "crescent": (r < 1) & (np.hypot(u - 0.45, v) > 0.7),
        "three lobes": r < 0.65 + 0.35 * np.cos(3 * angle),
        "four lobes": r < 0.65 + 0.35 * np.cos(4 * angle),
        "bar": (np.abs(u) < 1) & (np.abs(v) < 0.35),
        "cross": (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
    }
    return found[kind]


def slices(count: int, size: int, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw slices (M, 1, size, size) float32 and the organ of each, (M,)."""
    images = []
    y, x = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        radius, turn = rng.uniform(0.4, 0.7), rng.uniform(0, 2 * np.pi)
        a, b = y - rng.uniform(-0.25, 0.25), x - rng.uniform(-0.25, 0.25)
        organ = inside(
            ORGANS[number % len(ORGANS)],
            (a * np.cos(turn) + b * np.sin(turn)) / radius,
            (b * np.cos(turn) - a * np.sin(turn)) / (radius * rng.uniform(0.8, 1.0)),
        )
        # tissue around it: a slope and a wave of the slice's own
        around = rng.uniform(-0.4, 0.4) * a + rng.uniform(-0.4, 0.4) * b + 0.2 * np.sin(rng.uniform(2, 5) * (a + b) + turn)
        images.append(around + rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 1.0) * organ + rng.normal(0, NOISE, (size, size)))
    return np.stack(images)[:, None].astype(np.float32), np.arange(count) % len(ORGANS)


def make_encoder(model: str) -> Any:
    """Build the small encoder of `place_contrast`, or a network of timm."""
    if model == "small":
        return Encoder()
    from medssl.encoders.image2d import Image2D

    return Image2D(model=model)


def draw(images: np.ndarray, maker: PlaneViews, step: int, batch: int, seed: int) -> Views:
    """Make the views of one batch, each slice once an epoch."""
    per_epoch = len(images) // batch
    order = np.random.default_rng([seed, step // per_epoch]).permutation(len(images))
    chosen = order[step % per_epoch * batch :][:batch]
    valid, place = np.ones((1, *images.shape[2:]), dtype=bool), np.array([0.0])
    items = [
        Planes(images[number][None], valid, None, place, place + np.nan, {}, DrawKey(seed, step, position), int(number))
        for position, number in enumerate(chosen)
    ]
    data, seen, _ = maker.batch(items, "cpu")
    return Views(data, ViewsMeta("organs", "ct", torch.from_numpy(chosen), {}, {}, seen, ()))


def pretrain(arm: str, images: np.ndarray, *, model: str, epochs: int, batch: int, seed: int, lr: float = 1e-3) -> nn.Module:
    """Return the encoder of an arm."""
    torch.manual_seed(seed)
    encoder = make_encoder(model)
    if arm == "untrained":
        return encoder  # type: ignore[no-any-return]
    size = images.shape[-1]
    augment: dict[str, Any] = {"area": (0.5, 1.0), "flip": (0, 0.5), "rotate_deg": 180, "contrast": (0.7, 1.4), "brightness": 0.3}
    maker = PlaneViews("image", size=size, count=2, normalize="none", noise_std=0.1, blur={"probability": 0.5}, **augment)
    specs = {"image": ViewSpec("image", (size, size), None, 2)}
    if arm == "simclr":
        objective: nn.Module = GlobalLocalContrast(encoder, view_specs=specs, weights={"global": 1.0}, variant="random", hidden=256)
    else:
        published: dict[str, Any] = {"residual": False, "noise": 1.0} if arm == "published" else {}
        objective = GraphMatching(encoder, view_specs=specs, **published)
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    objective.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimiser.zero_grad()
        objective(draw(images, maker, step, batch, seed), StepContext(step=step))["loss"].backward()
        optimiser.step()
        schedule.step()
    return encoder  # type: ignore[no-any-return]


def embedded(encoder: Any, images: np.ndarray) -> Tensor:
    """Return unit features (M, E) of the frozen encoder."""
    encoder.eval()
    with torch.no_grad():
        return normalize(torch.cat([encoder.forward_features(x).pooled for x in torch.from_numpy(images).split(128)]), dim=1)


def neighbour_accuracy(known: Tensor, labels: np.ndarray, asked: Tensor, wanted: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Return the share of slices whose organ is the commonest among their k nearest, ties to the smaller number."""
    near = (asked @ known.T).topk(k, dim=1).indices
    votes = torch.nn.functional.one_hot(torch.from_numpy(labels)[near], len(ORGANS)).sum(dim=1)
    return float((votes.argmax(dim=1) == torch.from_numpy(wanted)).float().mean())


def play(arm: str, seed: int, *, model: str, size: int, items: int, tests: int, epochs: int, batch: int) -> dict[str, Any]:
    """Pretrain one arm on drawn slices and ask for the organs of others; return its row."""
    begin = time.perf_counter()
    images, labels = slices(items, size, seed, 0)
    asked, wanted = slices(tests, size, seed, 1)
    encoder = pretrain(arm, images, model=model, epochs=epochs, batch=batch, seed=seed)
    score = neighbour_accuracy(embedded(encoder, images), labels, embedded(encoder, asked), wanted)
    return {"arm": arm, "seed": seed, "accuracy": score, "s": time.perf_counter() - begin}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=3)
    options_parser.add_argument("--model", default="small", help="small, or a timm network")
    options_parser.add_argument("--size", type=int, default=32)
    options_parser.add_argument("--items", type=int, default=1600)
    options_parser.add_argument("--tests", type=int, default=800)
    options_parser.add_argument("--epochs", type=int, default=10)
    options_parser.add_argument("--batch", type=int, default=32)
    options_parser.add_argument("--folder", type=Path, default=Path("runs/matching_knn"))
    options = options_parser.parse_args(argv)
    settings = {name: getattr(options, name) for name in ("model", "size", "items", "tests", "epochs", "batch")}
    rows: list[dict[str, Any]] = []
    for seed in range(options.repeats):
        for arm in ARMS:
            rows.append(kept(options.folder / f"{arm}_{seed}.json", settings, partial(play, arm, seed, **settings)))
            print(rows[-1], flush=True)
    means = {arm: float(np.mean([row["accuracy"] for row in rows if row["arm"] == arm])) for arm in ARMS}
    checks = [
        Check("20-NN accuracy, graph matching minus untrained, mean of seeds", means["graph_matching"] - means["untrained"], 0.0),
        Check("graph matching minus SimCLR", means["graph_matching"] - means["simclr"], -BEHIND_SIMCLR),
    ]
    error = 0.5 * options.tests**-0.5
    notes = [
        f"chance is {1 / len(ORGANS):g}; {options.tests} slices are asked, so one standard error is at most {error:.2g}",
        "drawn slices, a small network and a tenth of the card's slices: a check of the method, not its result",
    ]
    return finish(Result("matching_knn", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
