"""A cohort of small pictures with a bright disc and a dark square on noise, and their label maps, in the forms that people have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (48, 64)


def picture(seed: int, shape: tuple[int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return image and label (H, W) uint8: structure 1 is a bright disc, 2 a dark square further right."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image, label = rng.normal(120, 12, shape), np.zeros(shape, np.uint8)
    at = rng.integers((14, 14), (shape[0] - 14, shape[1] // 2 - 8))
    disc = (rows - at[0]) ** 2 + (columns - at[1]) ** 2 < 64
    low = rng.integers((4, shape[1] // 2 + 2), (shape[0] - 16, shape[1] - 16))
    square = (rows >= low[0]) & (rows < low[0] + 12) & (columns >= low[1]) & (columns < low[1] + 12)
    for value, where, brightness in ((1, disc, 80), (2, square, -80)):
        image[where] += brightness
        label[where] = value
    return np.clip(image, 0, 255).astype(np.uint8), label


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_pictures(folder: Path, *, train: int = 4, val: int = 1, test: int = 2) -> Path:
    """Write the cohort as a folder; label maps are PNG, the first image is a JPEG of high quality."""
    lines = ["file,split,few_label_rank"]
    sides = ["train"] * train + ["val"] * val + ["test"] * test
    for number, side in enumerate(sides):
        image, label = picture(number)
        name = f"p{number}.jpg" if number == 0 else f"p{number}.png"
        save(folder / "images" / name, image)
        save(folder / "labels" / f"p{number}.png", label)
        lines.append(f"{name},{side},{number + 1 if side == 'train' else ''}")
    (folder / "split.csv").write_text("\n".join(lines) + "\n")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "disc": 1, "square": 2}}))
    return folder
