"""What does contrast by place learn? Quarter of the stack, and segmentation from one labelled volume (global-local card 8.3 and 8.5).

    python -m benchmarks.place_contrast

Phantoms are an ellipsoid with three structures nested in it; how much of each other they fill changes along the stack, one way only, while
size, shape, place, turn and grey values are each patient's own. The encoder is the card's U-Net (16-32-64-128 channels) at 32 px.

- *Quarter*: ridge regression on the pooled frozen encoder says in which quarter of its stack a slice lies; fitted on half of 64 new
  phantoms, scored on the others. Arms: untrained, and the three variants of the global term.
- *Few labels*: 500 steps on the slices of one labelled phantom, from scratch, from the encoder (global stage) and from encoder and decoder
  (global stage, then local stage with the encoder frozen). Dice of the three structures on 20 others. The labelled phantom and those that
  are scored are not among the 64 that are pretrained on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import Check, Result, finish, parser
from medssl.layers.tokens import flatten_tokens
from medssl.objectives.global_local_contrast import GlobalLocalContrast
from medssl.types import DrawKey, EncoderOutput, StepContext, Views, ViewsMeta, ViewSpec
from medssl.views.planes import Planes, PlaneViews

SIDE, SLICES, PARTS, STRUCTURES = 32, 16, 4, 3
WIDTHS = (16, 32, 64, 128)
NOISE = 0.15
DICE_GAIN, CLEARLY = 0.03, 0.05
VARIANTS = {"random": 2, "part_negatives": 3, "part": 2}
"""Variants of the global term, and views of a slice in each: the card's negatives-only variant takes three."""
INTENSITIES: dict[str, Any] = {"brightness": 0.3, "contrast": (0.7, 1.3), "noise_std": 0.1, "normalize": "none"}


@dataclass(frozen=True)
class Phantom:
    """One volume.

    Args:
        image: (N, H, W) float32.
        label: (N, H, W) int64, 0 to 3.
    """

    image: np.ndarray
    label: np.ndarray


def phantom(rng: np.random.Generator) -> Phantom:
    """Draw one phantom."""
    t = np.linspace(-0.95, 0.95, SLICES)
    size, ratio, angle = rng.uniform(0.6, 0.9), rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
    drift = rng.uniform(-0.15, 0.15, (2, 2))
    body = size * np.sqrt(1 - 0.8 * t**2)
    # what a structure fills of the one around it; the two slopes are what tells the two ends of a stack apart
    radii = np.cumprod([body, 0.72 + 0.12 * t, 0.66 - 0.14 * t, 0.6 + 0.12 * t], axis=0) * rng.uniform(0.93, 1.07, (4, 1))
    grey = np.array(
        [0.0, *rng.uniform(0.3, 0.5, 1), *rng.uniform(0.7, 1.0, 1), *rng.uniform(0.3, 0.6, 1), *rng.uniform(0.7, 1.0, 1)]
    )
    y, x = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    place = drift[:, 0, None] + drift[:, 1, None] * t
    u, v = y - place[0][:, None, None], x - place[1][:, None, None]
    reach = np.hypot(u * np.cos(angle) + v * np.sin(angle), (v * np.cos(angle) - u * np.sin(angle)) / ratio)
    inside = (reach[:, None] < radii.T[:, :, None, None]).sum(axis=1)  # 0 outside, 1 body, 2 to 4 structures
    image = grey[inside] + rng.normal(0, NOISE, inside.shape)
    return Phantom(image.astype(np.float32), np.maximum(inside - 1, 0))


def cohort(count: int, *seed: int) -> list[Phantom]:
    """Draw phantoms."""
    return [phantom(np.random.default_rng([*seed, number])) for number in range(count)]


class Encoder(nn.Module):
    """Two 3 x 3 convolutions with batch norm and ReLU per level, 2 x 2 maxima between levels."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.embed_dim, self.patch_size = 1, WIDTHS[-1], (2 ** (len(WIDTHS) - 1),) * 2
        self.levels = nn.ModuleList()
        for below, width in zip((1, *WIDTHS), WIDTHS):
            layers: list[nn.Module] = []
            for channels in (below, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.levels.append(nn.Sequential(*layers))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> EncoderOutput:
        maps: list[Tensor] = []
        for number, level in enumerate(self.levels):
            x = level(functional.max_pool2d(x, 2) if number else x)
            maps.append(x)
        tokens = flatten_tokens(x)
        return EncoderOutput(tokens, tuple(x.shape[2:]), tokens.mean(dim=1), tuple(maps))


def draw(phantoms: list[Phantom], maker: PlaneViews, step: int, batch: int, seed: int) -> Views:
    """Draw slices, position p from quarter p mod 4 of its volume, all positions of one volume in a row, and make their views."""
    items = []
    for position in range(batch):
        rng = np.random.default_rng([seed, step, position // PARTS])
        volume = int(rng.permutation(len(phantoms))[0])
        rng = np.random.default_rng([seed, step, position, 1])
        plane = position % PARTS * (SLICES // PARTS) + int(rng.integers(SLICES // PARTS))
        share = np.array([plane / (SLICES - 1)])
        image = phantoms[volume].image[plane][None, None]
        valid = np.ones((1, SIDE, SIDE), dtype=bool)
        items.append(Planes(image, valid, None, 2.5 * share, share, {}, DrawKey(seed, step, position), volume))
    data, seen, _ = maker.batch(items, "cpu")
    return Views(data, ViewsMeta("phantoms", "mri", torch.tensor([item.id for item in items]), {}, {}, seen, ()))


def contrast(encoder: Encoder, maker: PlaneViews, term: str, variant: str = "part") -> GlobalLocalContrast:
    """Build one term."""
    made: Any = variant
    spec = ViewSpec("image", (SIDE, SIDE), None, maker.count)
    return GlobalLocalContrast(
        encoder,
        **{"view_specs": {"image": spec}, "weights": {term: 1.0}, "variant": made, "partitions": PARTS},
        **{"dim": 64, "hidden": 256, "decoder_blocks": 2, "decoder_width": 32},
    )


def fit(objective: GlobalLocalContrast, phantoms: list[Phantom], maker: PlaneViews, *, steps: int, batch: int, seed: int) -> float:
    """Train a term; return the mean loss of the last tenth."""
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    objective.train()
    for step in range(steps):
        parts = objective(draw(phantoms, maker, step, batch, seed), StepContext(step=step))
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        losses.append(float(parts["loss"].detach()))
    return float(np.mean(losses[-max(steps // 10, 1) :])) if losses else float("nan")


def global_stage(variant: str, phantoms: list[Phantom], *, steps: int, batch: int, seed: int) -> tuple[Encoder, float]:
    """Return an encoder trained by a variant of the global term, and its loss; `untrained` trains nothing."""
    torch.manual_seed(seed)
    encoder = Encoder()
    if variant == "untrained":
        return encoder, float("nan")
    # the card's window of 100 of 192 px at most 60 px off, in shares of the picture
    maker = PlaneViews("image", size=SIDE, count=VARIANTS[variant], area=(0.5, 1.0), **INTENSITIES)
    objective = contrast(encoder, maker, "global", variant)
    return encoder, fit(objective, phantoms, maker, steps=steps, batch=batch, seed=seed)


def quarter_probe(encoder: Encoder, phantoms: list[Phantom]) -> float:
    """Return the accuracy of ridge regression on pooled features, fitted on the first half of the phantoms, scored on the second."""
    images = torch.from_numpy(np.concatenate([one.image for one in phantoms]))[:, None]
    encoder.eval()
    with torch.no_grad():
        z = torch.cat([encoder.forward_features(part).pooled for part in images.split(128)]).double().numpy()
    quarter = np.tile(np.arange(SLICES) * PARTS // SLICES, len(phantoms))
    half = len(z) // 2
    mean, std = z[:half].mean(axis=0), z[:half].std(axis=0) + 1e-6
    x = np.c_[(z - mean) / std, np.ones(len(z))]
    weight = np.linalg.solve(x[:half].T @ x[:half] + np.eye(x.shape[1]), x[:half].T @ np.eye(PARTS)[quarter[:half]])
    return float(((x[half:] @ weight).argmax(axis=1) == quarter[half:]).mean())


class Segmenter(nn.Module):
    """Encoder and the two decoder blocks of a local term; the last block, back to full size, always starts at random.

    Args:
        trunk: Has `encoder` and `decode`.
    """

    def __init__(self, trunk: GlobalLocalContrast) -> None:
        super().__init__()
        self.trunk = trunk
        self.last = nn.Sequential(nn.Conv2d(32 + WIDTHS[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(16, STRUCTURES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        low, skip = self.trunk.decode(x), self.trunk.encoder.levels[0](x)
        return self.head(self.last(torch.cat([functional.interpolate(low, scale_factor=2.0), skip], dim=1)))  # type: ignore[no-any-return]


def augmented(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn, scale, shift and mirror slices, and change their grey values, each by itself; labels stay whole numbers."""
    count = len(image)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = uniform(-0.5, 0.5), uniform(0.85, 1.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    rows = torch.stack([scale * angle.cos() * mirror, -scale * angle.sin(), uniform(-0.1, 0.1)], dim=1)
    other = torch.stack([scale * angle.sin() * mirror, scale * angle.cos(), uniform(-0.1, 0.1)], dim=1)
    grid = functional.affine_grid(torch.stack([rows, other], dim=1), list(image.shape), align_corners=False)
    image = functional.grid_sample(image, grid, align_corners=False)
    label = functional.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    image = image * uniform(0.8, 1.2)[:, None, None, None] + uniform(-0.1, 0.1)[:, None, None, None]
    return image, label


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the soft Dice over the batch, mean over classes."""
    wanted = functional.one_hot(label, STRUCTURES + 1).movedim(-1, 1).float()
    share = logits.softmax(dim=1)
    both, either = (share * wanted).sum(dim=(0, 2, 3)), (share + wanted).sum(dim=(0, 2, 3))
    return functional.cross_entropy(logits, label) + 1 - ((2 * both + 1e-3) / (either + 1e-3)).mean()


def segment(trunk: GlobalLocalContrast, labelled: Phantom, tests: list[Phantom], *, steps: int, seed: int) -> float:
    """Fine-tune everything on the slices of one phantom; return the mean Dice of the structures over other phantoms."""
    torch.manual_seed(seed)
    network = Segmenter(trunk.requires_grad_(True))
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(
        [*trunk.encoder.parameters(), *trunk.decoder.parameters(), *network.last.parameters(), *network.head.parameters()], lr=1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    image, label = torch.from_numpy(labelled.image)[:, None], torch.from_numpy(labelled.label)
    network.train()
    for _ in range(steps):
        rows = torch.randperm(SLICES, generator=generator)[:10]
        x, y = augmented(image[rows], label[rows], generator)
        loss = dice_loss(network(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        scores = []
        for one in tests:
            guess = network(torch.from_numpy(one.image)[:, None]).argmax(dim=1).numpy()
            for structure in range(1, STRUCTURES + 1):
                a, b = guess == structure, one.label == structure
                scores.append(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))
    return float(np.mean(scores))


def few_labels(
    pretrained: Encoder, seen: list[Phantom], *, seed: int, tests: int, local_steps: int, tune_steps: int, batch: int
) -> dict[str, float]:
    """Return the Dice of the three arms for one seed.

    Args:
        pretrained: Encoder after the global stage.
        seen: Phantoms that it was pretrained on, for the local stage.
        seed: Seed.
        tests: Phantoms that are scored.
        local_steps: Steps of the local stage.
        tune_steps: Steps of fine-tuning.
        batch: Slices per step of the local stage.
    """
    unseen, labelled = cohort(tests, seed, 2), cohort(1, seed, 1)[0]
    plain = PlaneViews("image", size=SIDE, count=2, **INTENSITIES)
    scratch, _ = global_stage("untrained", seen, steps=0, batch=batch, seed=seed)
    found = {}
    for arm, start in (("scratch", scratch), ("encoder", pretrained), ("encoder and decoder", pretrained)):
        torch.manual_seed(1000 + seed)  # the decoder's start is the same in all arms
        trunk = contrast(copy.deepcopy(start), plain, "local")
        if arm == "encoder and decoder":
            trunk.encoder.requires_grad_(False)
            fit(trunk, seen, plain, steps=local_steps, batch=batch, seed=seed)
        found[arm] = segment(trunk, labelled, unseen, steps=tune_steps, seed=seed)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=5)
    options_parser.add_argument("--volumes", type=int, default=64)
    options_parser.add_argument("--steps", type=int, default=600)
    options_parser.add_argument("--local-steps", type=int, default=200)
    options_parser.add_argument("--tune-steps", type=int, default=500)
    options_parser.add_argument("--tests", type=int, default=20)
    options_parser.add_argument("--batch", type=int, default=16)
    options = options_parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    quarter: dict[str, list[float]] = {}
    dice: dict[str, list[float]] = {}
    tuned = {"tests": options.tests, "local_steps": options.local_steps, "tune_steps": options.tune_steps, "batch": options.batch}
    for seed in range(options.repeats):
        seen, others = cohort(options.volumes, seed, 0), cohort(options.volumes, seed, 3)
        for variant in ("untrained", *VARIANTS) if seed < 3 else ("part",):
            encoder, loss = global_stage(variant, seen, steps=options.steps, batch=options.batch, seed=seed)
            score = quarter_probe(encoder, others)
            quarter.setdefault(variant, []).append(score)
            rows.append({"what": "quarter, accuracy", "arm": variant, "seed": seed, "score": score, "loss": loss})
            print(rows[-1], flush=True)
        for arm, score in few_labels(encoder, seen, seed=seed, **tuned).items():  # after `part`
            dice.setdefault(arm, []).append(score)
            rows.append({"what": "one label, Dice", "arm": arm, "seed": seed, "score": score})
            print(rows[-1], flush=True)
    means = {name: float(np.mean(scores[:3])) for name, scores in quarter.items()}
    means |= {name: float(np.mean(scores)) for name, scores in dice.items()}
    checks = [
        Check("quarter: part minus part_negatives", means["part"] - means["part_negatives"], 0.0),
        Check("quarter: part_negatives minus untrained", means["part_negatives"] - means["untrained"], 0.0),
        Check("quarter: part minus random (SimCLR)", means["part"] - means["random"], CLEARLY),
        Check("Dice: encoder and decoder minus scratch", means["encoder and decoder"] - means["scratch"], DICE_GAIN),
        Check("Dice: encoder minus scratch", means["encoder"] - means["scratch"], DICE_GAIN),
    ]
    notes = ["checks are of means over seeds (quarters: the first three); a quarter is guessed right in 0.25"]
    return finish(Result("place_contrast", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
