"""A cohort of small volumes of two channels, of which the sum shows the structures better than either, in the forms that have channels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from tests.evaluation.tiny_cohort import tiny_volume

SHAPE = (20, 18, 16)
AFFINE = np.array([[0.0, 1.1, 0, -20], [-1.5, 0, 0, 30], [0, 0, -2.2, 40], [0, 0, 0, 1]])  # permuted and flipped axes
NAMES = ("T2", "ADC")


def channels_of(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return image (2, X, Y, Z) int16, whose channels are a volume with two structures cut in two at random, and label uint8."""
    image, label = tiny_volume(seed, shape)
    part = np.random.default_rng(100 + seed).integers(0, 801, shape)
    return np.stack([part, 3 * (image - part) + 1000]).astype(np.int16), label  # the second in another unit


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def sides(train: int, val: int, test: int) -> list[str]:
    return ["train"] * train + ["val"] * val + ["test"] * test


def write_nnunet(folder: Path, *, train: int = 3, val: int = 0, test: int = 2, names: Sequence[str] = NAMES) -> Path:
    """Write the cohort as a raw folder of nnU-Net: one file per channel."""
    lines = ["file,split"]
    for number, side in enumerate(sides(train, val, test)):
        image, label = channels_of(number)
        for k, channel in enumerate(image):
            save(folder / "imagesTr" / f"miller_{number}_{k:04d}.nii.gz", channel)
        save(folder / "labelsTr" / f"miller_{number}.nii.gz", label)
        lines.append(f"miller_{number},{side}")
    (folder / "split.csv").write_text("\n".join(lines) + "\n")
    content = {"channel_names": dict(zip("0123", names)), "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_decathlon(folder: Path, *, train: int = 3, val: int = 0, test: int = 2, names: Sequence[str] = NAMES) -> Path:
    """Write the cohort as a Decathlon task: channels are the volumes of one 4-D file."""
    entries: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for number, side in enumerate(sides(train, val, test)):
        image, label = channels_of(number)
        save(folder / "imagesTr" / f"miller_{number}.nii.gz", np.moveaxis(image, 0, -1))
        save(folder / "labelsTr" / f"miller_{number}.nii.gz", label)
        key = {"train": "training", "val": "validation", "test": "test"}[side]
        entries[key].append({"image": f"./imagesTr/miller_{number}.nii.gz", "label": f"./labelsTr/miller_{number}.nii.gz"})
    content = {"modality": dict(zip("0123", names)), "labels": {"0": "background", "1": "a", "2": "b"}, "tensorImageSize": "4D"}
    (folder / "dataset.json").write_text(json.dumps({**content, **entries}))
    return folder
