"""An exported bundle where MONAI is installed and medssl is not, by MONAI's own command line.

    .venv/bin/python -m benchmarks.interop.monai_bundle prepare --folder /tmp/bundles      # where medssl is
    python3.11 -m venv /tmp/bundles/venv
    /tmp/bundles/venv/bin/pip install -c constraints-cpu.txt -r /tmp/bundles/requirements.txt
    /tmp/bundles/venv/bin/python benchmarks/interop/monai_bundle.py check --folder /tmp/bundles --out bundles.json

`prepare` exports random weights of three small encoders (or those of `--run`), writes an image, the features that medssl makes of it, and
`requirements.txt`: MONAI, torch, what `metadata.json` lists, and jsonschema for `verify_metadata`; nothing else. `check` runs
`python -m monai.bundle` with `verify_metadata`, `verify_net_in_out` and `run`, each in a process of its own, and compares what `run` wrote
with those features.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4  # float32, another torch may add in another order
SHAPE, SPACING = (40, 36, 24), (1.2, 1.0, 1.8)


def prepare(folder: Path, run: Path | None) -> None:
    """Export bundles and leave an image with our features of it."""
    from benchmarks.interop import leave_facts

    leave_facts(folder)
    runs = (
        {run.name: run} if run else {name: _random_run(folder / "runs" / name, name) for name in ("vit3d", "segresnet3d", "swin3d")}
    )
    (folder / "images").mkdir(exist_ok=True)
    _write_image(folder / "images" / "a.nii.gz")
    requirements: dict[str, str] = {}
    for name, path in runs.items():
        _export(path, folder, name)
        metadata = json.loads((folder / "bundles" / name / "configs" / "metadata.json").read_text())
        found = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"], "numpy": metadata["numpy_version"]}
        requirements |= {**found, **metadata["required_packages_version"]}
    lines = [f"{package}=={number}" for package, number in sorted(requirements.items())] + ["jsonschema"]  # of verify_metadata
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n")
    print(folder / "requirements.txt")


def _random_run(folder: Path, name: str) -> Path:
    import torch

    from medssl.build import build_encoder
    from medssl.weights import save_part

    small: dict[str, dict[str, Any]] = {
        "vit3d": {"image_size": [32, 32, 16], "hidden_size": 48, "num_heads": 4, "num_layers": 4},
        "segresnet3d": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
        "swin3d": {"feature_size": 12, "depths": [2, 1, 1, 1], "num_heads": [3, 2, 2, 2], "window_size": [4, 3, 2]},
    }
    windows = {"vit3d": [32, 32, 16], "segresnet3d": [16, 24, 8], "swin3d": [64, 32, 32]}
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "args": small[name]})
    facts = {
        "image_size": windows[name],
        "spacing_mm": [1.5, 1.5, 1.5],
        "spacing_source": "views",
        "intensity": {"normalize": "zscore"},
        "domains": ["mri"],
    }
    state = {key: v for key, v in encoder.net.state_dict().items() if key.startswith(tuple(encoder.key_groups["encoder"]))}
    save_part(folder / "weights" / "last", "encoder", state, {**encoder.part("encoder").manifest, **facts})
    (folder / "weights" / "index.json").write_text(json.dumps({"default": "encoder"}))
    return folder


def _write_image(file: Path) -> None:
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.7) ** 2 + z**2 < 1
    voxels = np.where(body, 300 + 80 * np.sin(5 * x) * np.cos(4 * y + z), 0) + rng.normal(0, 8, SHAPE)
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([*SPACING, 1.0])), file)


def _export(run: Path, folder: Path, name: str) -> None:
    """Export a bundle; the expected features come from our encoder, on the image as the bundle's own transforms prepare it."""
    import numpy as np
    import torch
    from monai.bundle import ConfigParser

    from benchmarks.common import without_monai_warnings
    from medssl.build import load_encoder
    from medssl.export.write import export_weights

    bundle = folder / "bundles" / name
    export_weights(run, "monai-bundle", bundle)
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    with without_monai_warnings():
        image = parser.get_parsed_content("preprocessing")({"image": str(folder / "images" / "a.nii.gz")})["image"]
    encoder = load_encoder(run).eval()

    def feature_map(x: Any) -> Any:
        output = encoder.forward_features(x)
        return output.tokens.transpose(1, 2).reshape(len(x), -1, *output.grid)

    with torch.no_grad():
        features = parser.get_parsed_content("inferer")(torch.as_tensor(np.asarray(image))[None], feature_map)[0]
    (folder / "expected").mkdir(exist_ok=True)
    np.save(folder / "expected" / f"{name}.npy", np.moveaxis(features.numpy(), 0, -1))


def check(folder: Path) -> dict[str, Any]:
    """Run MONAI's three commands on every bundle and compare; `met` is False where one fails or features differ."""
    import nibabel as nib
    import numpy as np

    rows: list[dict[str, Any]] = []
    for bundle in sorted((folder / "bundles").iterdir()):
        meta, config = str(bundle / "configs" / "metadata.json"), str(bundle / "configs" / "inference.json")
        out = folder / "features" / bundle.name
        schema = str(bundle / "docs" / "metadata_schema.json")
        commands = {
            "verify_metadata": ["--meta_file", meta, "--filepath", schema],
            "verify_net_in_out": ["--net_id", "network_def", "--meta_file", meta, "--config_file", config],
            "run": ["--config_file", config, "--bundle_root", str(bundle), "--dataset_dir", str(folder / "images"), "--output_dir", str(out)],
        }  # fmt: skip
        row: dict[str, Any] = {"bundle": bundle.name}
        for name, arguments in commands.items():
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "monai.bundle", name, *arguments], cwd=folder, capture_output=True, text=True
            )
            row[name] = "ok" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
            row[f"{name}_s"] = round(time.perf_counter() - begin, 1)
        if row["run"] == "ok":
            found = nib.load(out / "a_features.nii.gz").get_fdata(dtype=np.float32)
            expected = np.load(folder / "expected" / f"{bundle.name}.npy")
            row["shape"] = list(found.shape)
            same = found.shape == expected.shape
            row["max_difference"] = float(f"{np.abs(found - expected).max():.2g}") if same else None
            row["spread"] = float(f"{expected.std():.2g}")  # of the features, so that the difference means something
        print(row, flush=True)
        rows.append(row)
    packages = ("monai", "torch", "numpy", "nibabel", "einops", "pytorch-ignite", "fire", "jsonschema")
    absent = all(importlib.util.find_spec(name) is None for name in ("medssl", "timm", "torchvision"))
    met = absent and bool(rows) and all(_row_met(row) for row in rows)
    return {
        "benchmark": "interop_monai_bundle",
        "made_by": json.loads((folder / "made_by.json").read_text()),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages},
        "neither medssl, timm nor torchvision installed": absent,
        "rows": rows,
        "tolerance": TOLERANCE,
        "met": met,
    }


def _row_met(row: dict[str, Any]) -> bool:
    ran = all(row[name] == "ok" for name in ("verify_metadata", "verify_net_in_out", "run"))
    return ran and row["max_difference"] is not None and row["max_difference"] <= TOLERANCE


def main(argv: list[str] | None = None) -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "check"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="prepare: run folder of a vit3d, segresnet3d or swin3d; default random weights")
    parser.add_argument("--out", type=Path, help="check: JSON file to write")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    folder = given.folder.resolve()
    if given.step == "prepare":
        prepare(folder, given.run)
        return
    found = check(folder)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    if not found["met"]:
        sys.exit("a bundle did not run, or its features differ")


if __name__ == "__main__":
    main()
