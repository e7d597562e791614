"""A contact sheet of sectors: the middle frame of every ultrasound clip of a folder with the outline of what is kept.

For the eye, and for the numbers of `tests/domains/test_sectors.py`: sector detection is judged by looking. The picture shows patients;
it stays where `--out` puts it and is no artefact of this repository.

    python -m benchmarks.sector_sheet ../shared/data/us_lung_video --out sheet.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from medssl.domains.ultrasound import Ultrasound
from medssl.errors import ImageError
from medssl.types import Sample

CELL = 240
COLUMNS = 7


def clip_files(folder: Path) -> list[Path]:
    """Return the clips of a folder, sorted; folders and tables are left out."""
    suffixes = {".avi", ".mp4", ".mov", ".mpeg", ".mpg", ".gif", ".dcm"}
    return [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def outlined(raw: Sample, sample: Sample) -> np.ndarray:
    """Return the middle frame in RGB (H, W, 3) with the outline of the sector in yellow, and what is dropped darkened."""
    from scipy import ndimage

    frame = raw.image[len(raw.image) // 2] if raw.meta.kind == "clip" else raw.image
    grey = frame.astype(np.float32).mean(axis=0)
    picture = np.repeat((grey * (255 / max(1.0, float(grey.max()))))[..., None], 3, axis=2)
    valid = np.ones(grey.shape, dtype=bool) if sample.valid is None else sample.valid
    picture[~valid] *= 0.6
    picture[~valid, 2] += 40
    width = max(1, max(grey.shape) // CELL)
    picture[valid & ~ndimage.binary_erosion(valid, iterations=width)] = (255, 220, 0)
    return picture.clip(0, 255).astype(np.uint8)


def sheet(files: list[Path], columns: int = COLUMNS) -> np.ndarray:
    """Return one picture of all files, in order, each with its number and the share that is kept."""
    from PIL import Image, ImageDraw

    rows = -(-len(files) // columns)
    page = Image.new("RGB", (columns * CELL, rows * (CELL + 14)))
    draw = ImageDraw.Draw(page)
    for number, path in enumerate(files):
        at = (number % columns * CELL, number // columns * (CELL + 14))
        try:
            raw, sample = (Ultrasound(sector=sector).read([path], series_id="0" * 32) for sector in (False, True))
        except ImageError as err:
            draw.text((at[0] + 2, at[1] + 1), f"{number} {err.reason}", fill=(255, 90, 90))
            continue
        small = Image.fromarray(outlined(raw, sample))
        small.thumbnail((CELL - 4, CELL - 4))
        page.paste(small, (at[0] + 2, at[1] + 14))
        facts = sample.meta.facts
        text = f"{number} {facts.get('sector_source')} {float(facts.get('sector_fraction', 1)):.2f} {sample.image.shape[-2]}x{sample.image.shape[-1]}"
        draw.text((at[0] + 2, at[1] + 1), text, fill=(255, 255, 255))
    return np.asarray(page)


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--columns", type=int, default=COLUMNS)
    arguments = parser.parse_args()
    from PIL import Image

    files = [path for folder in arguments.folder for path in clip_files(folder)]
    Image.fromarray(sheet(files, arguments.columns)).save(arguments.out)
    print(f"{len(files)} files -> {arguments.out}")


if __name__ == "__main__":
    main()
