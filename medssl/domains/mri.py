"""Magnetic resonance volumes: intensities have no unit, so statistics are those of the body.

Formats that cannot name their modality (NIfTI, NRRD, MetaImage) are taken at the word of the recipe that names this
domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.base import build_sample, named
from medssl.domains.statistics import foreground
from medssl.domains.volume_files import read_volume
from medssl.errors import ImageError
from medssl.types import Sample

N4_SHRINK = 4
N4_MIN_SIZE = 16
"""The field is fitted on every fourth voxel, as N4's authors do, but never on fewer than 16 along an axis."""


class MRI:
    """Reads MR volumes; the foreground is the body (see `statistics.foreground`).

    `meta.facts` names the component: magnitude, phase, real, imaginary or unknown.

    Args:
        n4: Correct the bias field with N4 (SimpleITK, one thread, so that equal files give equal voxels); the volume becomes
            float32, and reading takes seconds instead of milliseconds.
        philips_scaling: Read floating point values from Philips DICOM: FP = (SV * RS + RI) / (RS * SS), with stored value
            SV, rescale slope RS and intercept RI and the private scale slope SS (2005,100E). They are comparable between
            the images of a study, but float32. By default values are those of the display, as everywhere else: one
            factor per volume changes nothing after normalisation. Slices of one volume with different rescale slopes
            are always read as floating point values, because their display values cannot be compared.

    Reference:
        Tustison et al., N4ITK, IEEE Trans. Med. Imaging 2010. Chenevert et al., Translational Oncology 2014, on Philips.
    """

    name = "mri"
    version = 2

    def __init__(self, n4: bool = False, philips_scaling: bool = False) -> None:
        self.n4 = bool(n4)
        self.philips_scaling = bool(philips_scaling)

    def params(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"n4": self.n4, "philips_scaling": self.philips_scaling}

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one MR volume.

        Raises:
            ImageError: The files hold another modality (`no_domain`), or cannot be used (see `read_volume`).
        """
        try:
            raw = read_volume(files, part, philips_scaling=self.philips_scaling)
            if raw.modality not in ("MR", "unknown"):
                raise ImageError(
                    "no_domain",
                    f"modality {_safe(raw.modality)} in the domain mri, which takes MR; change the recipe's query",
                )
            mask = foreground(raw.array, raw.valid)
            if self.n4:
                raw.array = correct_bias(raw.array, mask, raw.spacing_mm)
                mask = foreground(raw.array, raw.valid)
        except ImageError as err:
            raise named(err, series_id) from err
        return build_sample(raw, mask, series_id=series_id, domain=self.name, units="arbitrary")

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return the body, (X, Y, Z) bool."""
        return foreground(sample.image[0], sample.valid)


def correct_bias(array: np.ndarray, mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Divide by the smooth bias field that N4 finds in the foreground.

    Args:
        array: (X, Y, Z), any dtype.
        mask: (X, Y, Z) bool, voxels that the field is fitted to.
        spacing_mm: Along X, Y, Z.

    Returns:
        (X, Y, Z) float32; voxels outside the mask are divided by the same field.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T, dtype=np.float32))
    inside = sitk.GetImageFromArray(np.ascontiguousarray((mask & (array > 0)).T, dtype=np.uint8))
    for volume in (image, inside):
        volume.SetSpacing([float(value) for value in spacing_mm])
    shrink = [max(1, min(N4_SHRINK, n // N4_MIN_SIZE)) for n in array.shape]
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetNumberOfThreads(1)  # sums in another order give other last digits
    corrector.Execute(sitk.Shrink(image, shrink), sitk.Shrink(inside, shrink))
    field = corrector.GetLogBiasFieldAsImage(image)  # a view of an image dies with it: both stay named
    corrected: np.ndarray = sitk.GetArrayViewFromImage(image) / np.exp(sitk.GetArrayViewFromImage(field))
    return corrected.astype(np.float32, copy=False).T


def _safe(modality: str) -> str:
    """Return a DICOM modality code, or `unknown` for free text in its place."""
    return modality if len(modality) <= 4 and modality.isalnum() and modality.isupper() else "unknown"
