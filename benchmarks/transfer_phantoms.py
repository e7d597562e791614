"""Sanity experiment A10.6 of the method card: five labelled phantoms, Dice of pretrained against scratch over five seeds.

The card expects pretrained above scratch. With the encoder alone it is (a slow test says so), with the decoder too it is not.

    python -m benchmarks.transfer_phantoms
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.networks.segmentation import build_segresnet, load_pretrained, set_head_prior
from medssl.objectives.mae_cnn import MAECNN
from medssl.phantoms.body import labelled_toy_phantoms
from medssl.seeding import counter_rng
from medssl.training.run_folder import facts_of_machine
from medssl.training.schedules import warmup_cosine
from medssl.types import StepContext, Views, ViewsMeta
from medssl.views.masks import block_mask
from medssl.weights import write_atomic

SIZE = 16
ENCODER = {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}


def cohort() -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 64 images without labels, and images and labels of 5 phantoms to fine-tune on and of 20 to score on."""
    images, labels = (torch.from_numpy(np.asarray(array)) for array in labelled_toy_phantoms(96, SIZE, seed=3))
    labels = labels.long()
    return images[:64], (images[64:69], labels[64:69]), (images[69:89], labels[69:89])


def pretrain(images: Tensor, steps: int) -> MAECNN:
    torch.manual_seed(0)
    objective = MAECNN(SegResNet3D(**ENCODER), image_size=(SIZE,) * 3)  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(step, steps=steps, base=1e-3, warmup=20)
        batch = images[torch.randint(len(images), (4,), generator=generator)]
        masks = [torch.from_numpy(block_mask((4, 4, 4), 0.6, counter_rng(0, step, i))) for i in range(4)]
        valid = torch.ones(4, 1, SIZE, SIZE, SIZE, dtype=torch.bool)
        meta = ViewsMeta("toy", "mri", torch.arange(4), {}, {}, {"volume": valid}, ())
        views = Views({"volume": batch[:, None], "volume_mask": torch.stack(masks)[:, None]}, meta)
        loss = objective(views, StepContext(step=step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
    return objective


def finetune(objective: MAECNN | None, images: Tensor, labels: Tensor, seed: int, steps: int, *, decoder: bool) -> nn.Module:
    torch.manual_seed(seed)
    network = build_segresnet(encoder={"name": "segresnet3d", "args": ENCODER}, out_channels=4)
    frequencies = np.bincount(labels.flatten().numpy(), minlength=4) / labels.numel()
    set_head_prior(network, frequencies.tolist())
    if objective is not None:
        parts = objective.exported()
        states = {}
        for name, part in parts.items():
            keys = tuple(f"net.{key}" for key in part.keys or ())
            states[name] = {k.removeprefix("net."): v for k, v in part.module.state_dict().items() if k.startswith(keys)}
        load_pretrained(
            network,
            states["encoder"],
            {**parts["encoder"].manifest, "part": "encoder"},
            decoder_state=states["decoder"] if decoder else None,
        )
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (2,), generator=generator)
        loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    return network.eval()


def mean_dice(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        predicted = network(images).argmax(dim=1)
    scores = []
    for value in (1, 2, 3):
        both = ((predicted == value) & (labels == value)).sum()
        scores.append(float(2 * both / ((predicted == value).sum() + (labels == value).sum()).clamp_min(1)))
    return float(np.mean(scores))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 40, 80, 160])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transfer_phantoms.json")
    options = parser.parse_args(argv)
    unlabelled, few, test = cohort()
    objective = pretrain(unlabelled, options.pretrain_steps)
    rows = []
    for steps in options.steps:
        for arm, source, decoder in (("scratch", None, False), ("encoder", objective, False), ("encoder_decoder", objective, True)):
            scores = [mean_dice(finetune(source, *few, seed, steps, decoder=decoder), *test) for seed in range(options.seeds)]
            rows.append({"steps": steps, "arm": arm, "dice": scores, "mean": float(np.mean(scores))})
            print(f"| {steps} | {arm} | {np.mean(scores):.3f} | {', '.join(f'{score:.2f}' for score in scores)} |", flush=True)
    content = {"rows": rows, "pretrain_steps": options.pretrain_steps, "size": SIZE, **facts_of_machine()}
    write_atomic(options.out, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
