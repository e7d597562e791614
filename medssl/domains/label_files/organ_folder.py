"""A folder of one mask per organ, named by its file: `liver.nii.gz`, `spleen.nii.gz` (TotalSegmentator and others)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medssl.domains.label_files.base import UNCERTAIN, Grid, LabelMap, Painter, values_in
from medssl.domains.volume_files import read_label
from medssl.errors import GeometryError, ImageError

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")


def read_organ_folder(folder: Path, grid: Grid, structures: Mapping[str, int] | None = None) -> LabelMap:
    """Read a folder of masks onto the grid of the image.

    A mask has 0 and one other value, whichever; -1 marks uncertain voxels. A file without such a voxel says that the organ is
    empty; an organ without a file is unlabelled.

    Args:
        folder: Holds the masks and nothing else that looks like one.
        grid: Grid of the image.
        structures: Name to value; None numbers the files in the order of their names.

    Raises:
        GeometryError: A mask lies on another grid.
        ImageError: A mask cannot be read, or holds several structures; masks are called by their place in the order of names.
    """
    painter = Painter(grid, structures)
    files = organ_files(folder)
    doubt = np.zeros(grid.shape, dtype=bool)
    values = painter.declare([organ_name(path) for path in files])
    for number, (path, value) in enumerate(zip(files, values), start=1):
        if value is None:
            continue
        try:
            mask = read_label(path, (grid.affine, grid.shape))
            found = [v for v in values_in(mask) if v not in (0, UNCERTAIN)]
            if len(found) > 1:
                raise ImageError(
                    "unsupported_pixels",
                    f"a mask holds {len(found)} values beside 0; a mask of one organ holds one; give a file with several "
                    "structures as a label map, not in a folder of organs",
                )
        except ImageError as err:
            text = f"organ mask {number} of {len(files)}: {str(err).replace(path.name, 'map')}"
            raise (GeometryError(text, err.reason) if isinstance(err, GeometryError) else ImageError(err.reason, text)) from None
        doubt |= mask == UNCERTAIN
        painter.add(value, mask == found[0] if found else np.zeros(mask.shape, dtype=bool), (0, 0, 0))
    painter.uncertain(doubt)
    return painter.done()


def organ_files(folder: Path) -> list[Path]:
    """Return the masks of a folder in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(SUFFIXES))


def organ_name(path: Path) -> str:
    """Return the name of the organ of a mask file."""
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)]
