"""Computed tomography in Hounsfield units.

HU are taken from DICOM with rescale type HU or none and the role of a source or reformatted image. NIfTI, NRRD and
MetaImage cannot say what their values are: they are taken for HU, flagged `hu_assumed`, and refused when no value is
negative, because every CT field of view holds air or fat below zero while shifted (offset 1024) or windowed copies do
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.archive.rows.roles import role_of
from medssl.domains.base import build_sample, named
from medssl.domains.statistics import above
from medssl.domains.volume_files import RawVolume, read_volume
from medssl.errors import ImageError
from medssl.types import Sample

AIR_HU = -1024
"""What voxels outside the reconstruction circle are set to; they are invalid in any case."""
BODY_HU = -500.0
"""Between air with lung (below about -600) and fat (about -100): the body without its lungs and without air."""


class CT:
    """Reads CT volumes; the foreground is what lies above `body_hu`.

    Args:
        body_hu: Lower limit of the foreground in HU.
        keep_table: Leave the couch and everything else beside the body in the image. False sets it to air: all that is
            not the largest connected body, whose inside (lungs, bowel gas) is filled slice by slice and stays. What
            touches the body, a mattress or a cushion denser than the limit, stays with it.
    """

    name = "ct"
    version = 2

    def __init__(self, body_hu: float = BODY_HU, keep_table: bool = True) -> None:
        self.body_hu = float(body_hu)
        self.keep_table = bool(keep_table)

    def params(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"body_hu": self.body_hu, "keep_table": self.keep_table}

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one CT volume.

        Raises:
            ImageError: Another modality (`no_domain`), values that are not HU (`not_hu`), a role such as localiser or
                derived map, or anything that `read_volume` refuses.
        """
        try:
            raw = read_volume(files, part)
            flags = _check(raw)
            if raw.valid is not None and raw.array.dtype != np.uint8:
                raw.array[~raw.valid] = AIR_HU
            if not self.keep_table and raw.array.dtype != np.uint8:
                raw.array[~body(raw.array, self.body_hu, raw.valid, raw.slice_axis)] = AIR_HU
            mask = above(raw.array, self.body_hu, raw.valid)
            if not mask.any():
                mask = np.ones(raw.array.shape, dtype=bool) if raw.valid is None else raw.valid.copy()
        except ImageError as err:
            raise named(err, series_id) from err
        return build_sample(raw, mask, series_id=series_id, domain=self.name, units="HU", flags=flags)

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return voxels above `body_hu`, (X, Y, Z) bool."""
        return above(sample.image[0], self.body_hu, sample.valid)


def body(array: np.ndarray, body_hu: float, valid: np.ndarray | None = None, slice_axis: int | None = None) -> np.ndarray:
    """Return the body with its inside: the largest component above a limit, its holes filled slice by slice.

    Args:
        array: (X, Y, Z) HU.
        body_hu: Lower limit of tissue.
        valid: (X, Y, Z) bool or None.
        slice_axis: Axis along which slices lie; the last one when unknown.

    Returns:
        (X, Y, Z) bool; everything when nothing is above the limit.
    """
    from scipy import ndimage

    labels, n = ndimage.label(above(array, body_hu, valid))
    if n == 0:
        return np.ones(array.shape, dtype=bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask: np.ndarray = labels == int(sizes.argmax())
    del labels
    # Airways and bowel are open at the ends of the volume, so holes are closed in planes.
    planes = np.moveaxis(mask, 2 if slice_axis is None else slice_axis, 0)
    for plane in planes:
        plane[...] = ndimage.binary_fill_holes(plane)
    return mask


def _check(raw: RawVolume) -> tuple[str, ...]:
    if raw.modality not in ("CT", "unknown"):
        raise ImageError("no_domain", "not a CT in the domain ct, which takes CT; change the recipe's query")
    if raw.modality == "CT":
        role = role_of(raw.image_type)
        if role not in ("source", "reformat"):
            raise ImageError(role, f"a CT image of the role {role}; source and reformat are accepted; leave it out")
        if raw.units != "HU":
            raise ImageError("not_hu", "CT with a rescale type other than HU; HU are needed; leave it out")
        return ()
    if float(raw.array.min()) >= 0:
        raise ImageError(
            "not_hu",
            "no value is below zero, so these are not HU; convert the image to HU (air near -1000)",
        )
    return ("hu_assumed",)
