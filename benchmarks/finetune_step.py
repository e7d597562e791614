"""A fine-tuning step and sliding-window inference, ours beside a plain MONAI loop on the same network.

    python -m benchmarks.finetune_step

Training: both cut random crops of volumes that lie in memory, half and more of them around a structure, z-score them, and do forward, Dice plus
cross-entropy, backward, gradient clipping and AdamW on networks with equal start weights. MONAI's loop is what its tutorials write:
`CacheDataset` with `NormalizeIntensityd` done once, `RandCropByPosNegLabeld`, `DataLoader`, no workers. Inference: one whole volume to a label
map, normalisation included, with the same window, overlap and weighting. Targets: a step at most 1.1 times MONAI's, inference no slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser, times_faster, without_monai_warnings
from medssl.evaluation import finetune, segmentation_training
from medssl.evaluation.learning_rates import parameter_groups
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.volumes import TrainingCrops, Volume, structure_points

NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "segresnet": (
        "segresnet",
        {"name": "segresnet3d", "args": {"init_filters": 8, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]}},
        {},
    ),
    "unetr": (
        "unetr",
        {"name": "vit3d", "args": {"image_size": [48, 48, 48], "hidden_size": 192, "num_heads": 3}},
        {"feature_size": 8},
    ),
    "swin_unetr": (
        "swin_unetr",
        {"name": "swin3d", "args": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}},
        {},
    ),
    "resenc_unet": (
        "resenc_unet",
        {
            "name": "resenc3d",
            "args": {
                "features_per_stage": [8, 16, 32, 64],
                "n_blocks_per_stage": [1, 2, 2, 2],
                "kernel_sizes": [3, 3, 3, 3],
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            },
        },
        {},
    ),
}
COARSE = {"swin_unetr": 64}
"""Crops of networks that need multiples of 32."""
SLOWER_AT_MOST, FASTER_AT_LEAST = 1.1, 1.0


def volumes(count: int, shape: tuple[int, int, int]) -> list[Volume]:
    """Return labelled random volumes with two structures."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        image = rng.normal(100, 20, shape).astype(np.float32)
        label = np.zeros(shape, dtype=np.int16)
        for value in (1, 2):
            low = [int(rng.integers(4, n - 20)) for n in shape]
            label[tuple(slice(a, a + 16) for a in low)] = value
        image += 30 * label
        stats = {"mean": float(image.mean()), "std": float(image.std()), "min": float(image.min())}
        stats |= {"p00_5": float(np.quantile(image, 0.005)), "p99_5": float(np.quantile(image, 0.995))}
        made.append(
            Volume(image[None], np.ones(shape, dtype=bool), label, (1.0, 1.0, 1.0), np.eye(4), stats, structure_points(label))
        )
    return made


def our_step(settings: FinetuneSettings, shelf: list[Volume]) -> tuple[Any, Callable[[], float]]:
    """Return the network and a call that does what a turn of `finetune._train` does."""
    network = finetune.build_network(settings, n_classes=3, seed=0)
    network.to(memory_format=torch.channels_last_3d).train()  # type: ignore[call-overload]
    crops = TrainingCrops(
        size=settings.crop, spacing_mm=None, normalize=settings.normalize, augment={}, foreground=settings.foreground, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    encoder = finetune.start_encoder(settings, None, 0)
    factors = segmentation_training.encoder_scales(network, encoder, settings, pretrained=False)
    optimizer = torch.optim.AdamW(parameter_groups(network, factors, settings.weight_decay), lr=1e-4)
    loss_of, order, steps = (
        segmentation_training.build_loss(settings),
        segmentation_training.case_order(len(shelf), 0),
        iter(range(10**9)),
    )

    def step() -> float:
        images, labels = crops.batch([shelf[next(order)] for _ in range(settings.batch)], next(steps))
        return segmentation_training.train_step(network, optimizer, loss_of, (images, labels, None), settings)

    return network, step


def monai_step(settings: FinetuneSettings, shelf: list[Volume]) -> tuple[Any, Callable[[], float]]:
    """Return the network and a call that does a step of MONAI's usual loop."""
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DiceCELoss
    from monai.transforms import Compose, EnsureTyped, NormalizeIntensityd, RandCropByPosNegLabeld

    keys = ["image", "label"]
    transforms = Compose([
        EnsureTyped(keys),
        NormalizeIntensityd("image"),
        RandCropByPosNegLabeld(
            keys, "label", settings.crop, pos=settings.foreground, neg=1 - settings.foreground, num_samples=1, image_key="image"
        ),
    ])  # fmt: skip
    assert all(volume.label is not None for volume in shelf)
    items = [{"image": volume.image, "label": volume.label[None]} for volume in shelf]  # type: ignore[index]
    loader = DataLoader(CacheDataset(items, transforms, progress=False), batch_size=settings.batch, shuffle=True, num_workers=0)
    network = finetune.build_network(settings, n_classes=3, seed=0).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=settings.weight_decay)
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=settings.batch_dice)

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    batch = batches()

    def step() -> float:
        shown = next(batch)
        optimizer.zero_grad(set_to_none=True)
        found = loss(network(shown["image"]), shown["label"])
        found.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        optimizer.step()
        return float(found.detach())

    return network, step


def monai_inference(network: Any, volume: Volume, settings: FinetuneSettings) -> Callable[[], Any]:
    """Return a call that segments a volume as MONAI's tutorials do."""
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import AsDiscrete, Compose, EnsureType, NormalizeIntensity

    prepare, discrete = Compose([EnsureType(), NormalizeIntensity()]), AsDiscrete(argmax=True)
    inferer = SlidingWindowInferer(settings.crop, sw_batch_size=settings.batch, overlap=settings.overlap, mode="gaussian")

    def infer() -> Any:
        network.eval()
        with torch.no_grad():
            return discrete(inferer(prepare(volume.image)[None], network)[0])

    return infer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options_parser.add_argument("--crop", type=int, default=48)
    options_parser.add_argument("--size", type=int, nargs=3, default=[72, 64, 56])
    options_parser.add_argument("--batch", type=int, default=2)
    options_parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = options_parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows, checks, details = [], [], {}
    for name in options.networks:
        network, encoder, more = NETWORKS[name]
        settings = FinetuneSettings(
            network=network, encoder=encoder, network_args=more, crop=(COARSE.get(name, options.crop),) * 3, batch=options.batch
        )
        shelf = volumes(4, tuple(max(n, c) for n, c in zip(options.size, settings.crop)))  # MONAI's crop pads nothing
        with without_monai_warnings():
            (mine, step), (theirs, peer_step) = our_step(settings, shelf), monai_step(settings, shelf)
            ours, peer = "medssl", "MONAI"
            seconds = {"step": interleave({ours: step, peer: peer_step}, repeats=options.repeats)}
            theirs.load_state_dict(mine.state_dict())
            infer = {
                ours: lambda n=mine, v=shelf[0], s=settings: finetune.predict(n, v, s),
                peer: monai_inference(theirs, shelf[0], settings),
            }
            same = float((np.asarray(infer[ours]()) == np.asarray(infer[peer]())[0]).mean())
            seconds["inference"] = interleave(infer, repeats=options.repeats)
        for what, found in seconds.items():
            for loop in (ours, peer):
                rows.append({
                    "network": name, "what": what, "loop": loop, **milliseconds(found, loop),
                    "ours_is_times_faster": times_faster(found, ours, loop),
                })  # fmt: skip
            details[f"{name} {what}"] = found
        slower = 1 / times_faster(seconds["step"], ours, peer)
        checks.append(Check(f"{name}: time of a step against MONAI's", slower, SLOWER_AT_MOST, at_least=False))
        checks.append(
            Check(f"{name}: speed of inference against MONAI's", times_faster(seconds["inference"], ours, peer), FASTER_AT_LEAST)
        )
        checks.append(Check(f"{name}: share of voxels with the same label", same, 0.999))
    notes = [
        "equal start weights; crops are drawn by each loop's own rule, so losses differ from step to step",
        "ours keeps the network channels-last on the CPU, in training as in inference; MONAI's loop leaves it as it is built",
    ]
    return finish(Result("finetune_step", rows, checks, vars(options), notes, details), options.out)


if __name__ == "__main__":
    main()
