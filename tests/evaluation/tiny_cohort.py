"""A cohort of small volumes with two bright structures, written in the folder form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TINY_ENCODER: dict[str, Any] = {
    "name": "segresnet3d",
    "args": {"in_channels": 1, "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
}


def tiny_volume(seed: int, shape: tuple[int, int, int] = (20, 18, 16)) -> tuple[np.ndarray, np.ndarray]:
    """Return image int16 and label uint8: a body with two boxes of different brightness at jittered places."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.float64)
    label = np.zeros(shape, np.uint8)
    image[1:-1, 1:-1, 1:-1] = 200
    for value, brightness, corner in ((1, 500, (3, 4, 4)), (2, 800, (11, 8, 6))):
        start = np.array(corner) + rng.integers(-1, 2, 3)
        box = tuple(slice(a, a + 6) for a in start)
        image[box], label[box] = brightness, value
    image += rng.normal(0, 20, shape)
    return np.clip(np.rint(image), 0, None).astype(np.int16), label


def write_nifti(path: Path, array: np.ndarray, spacing_mm: Sequence[float] = (1.0, 1.0, 2.0)) -> None:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, np.diag([*spacing_mm, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_cohort(folder: Path, *, train: int = 3, val: int = 1, test: int = 2) -> Path:
    """Write the cohort; training cases have ranks in reverse order of their names."""
    lines = ["file,split,few_label_rank"]
    sides = ["train"] * train + ["val"] * val + ["test"] * test
    for number, side in enumerate(sides):
        image, label = tiny_volume(number)
        write_nifti(folder / "images" / f"v{number}.nii.gz", image)
        write_nifti(folder / "labels" / f"v{number}.nii.gz", label)
        lines.append(f"v{number}.nii.gz,{side},{train - number if side == 'train' else ''}")
    (folder / "split.csv").write_text("\n".join(lines) + "\n")
    return folder
