"""Label curve on the hippocampus set: pretrained against its scratch twin, Dice on the 50 test volumes.

    python benchmarks/label_curve_hippocampus.py --data ../shared/data/msd_hippocampus --weights RUN --out OUT \
        [--network segresnet|unetr] [--counts 5 20] [--seeds 0 1 2] [--steps 2000] [--set lr=1e-3 ...]

Cells are kept as they finish: kill it and run the same command again to continue. `--weights scratch` computes the twin
    alone.
Settings that answer for the quality of scratch are in docs/results.md with the arms that were tried; curves of the 20
validation volumes are in each cell's `curve.jsonl`. Writes OUT/label_curve_hippocampus.json (summary, settings,
hardware) and prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from medssl.evaluation.cohort import Cohort
from medssl.evaluation.finetune import FinetuneResult, FinetuneSettings, Pretrained, open_weights
from medssl.evaluation.label_curve import Cell, label_curve, markdown
from medssl.weights import write_atomic

COMMON: dict[str, Any] = {
    "domain": "mri",
    "normalize": "zscore",
    "batch": 2,
    "weight_decay": 1e-5,
    "foreground": 0.5,
    "augment": {
        "rotate_deg": 15,
        "scale": [0.9, 1.1],
        "noise_std": 0.1,
        "brightness": 0.2,
        "contrast": [0.8, 1.25],
        "gamma": [0.7, 1.5],
    },
    "val_every": 250,
    "val_cases": 20,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "segresnet": {
        "crop": (32, 40, 32),
        "lr": 3e-3,
        "encoder": {"name": "segresnet3d", "args": {"in_channels": 1, "init_filters": 8}},
    },
    "unetr": {
        "crop": (48, 64, 48),
        "lr": 1e-3,
        "network_args": {"feature_size": 8},
        "encoder": {"name": "vit3d", "args": {"image_size": [48, 64, 48], "hidden_size": 192, "num_heads": 6}},
    },
}


def hardware(device: str) -> dict[str, Any]:
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/msd_hippocampus"))
    parser.add_argument("--weights", default="scratch", help="run folder, safetensors file, or scratch")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="segresnet")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, values in YAML")
    options = parser.parse_args(argv)

    values = {**COMMON, **NETWORKS[options.network], "network": options.network}
    values |= {"steps": options.steps, "device": options.device}
    values |= {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    arms: dict[str, Pretrained | None] = {}
    if options.weights != "scratch":
        arms["pretrained"] = open_weights(options.weights, transfer=values.get("transfer", "encoder"))
        values["encoder"] = None  # taken from the weights, for the twin too
    arms["scratch"] = None
    start = time.perf_counter()

    def on_cell(number: int, total: int, cell: Cell, result: FinetuneResult) -> None:
        means = ", ".join(f"{name} {100 * value:.1f}" for name, value in result.mean().items())
        print(f"[{number}/{total}] {cell.name}: {means} ({time.perf_counter() - start:.0f} s)", flush=True)

    summary = label_curve(
        Cohort.load(options.data),
        FinetuneSettings.from_dict(values),
        options.out,
        arms=arms,
        counts=options.counts,
        seeds=options.seeds,
        on_cell=on_cell,
    )
    summary["hardware"] = hardware(options.device)
    write_atomic(options.out / "label_curve_hippocampus.json", json.dumps(summary, indent=1).encode())
    print(markdown(summary))


if __name__ == "__main__":
    main()
