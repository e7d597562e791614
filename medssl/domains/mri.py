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


class MRI:
    """Reads MR volumes; the foreground is the body (see `statistics.foreground`)."""

    name = "mri"
    version = 1

    def params(self) -> dict[str, Any]:
        """Return the arguments: there are none."""
        return {}

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one MR volume.

        Raises:
            ImageError: The files hold another modality (`no_domain`), or cannot be used (see `read_volume`).
        """
        try:
            raw = read_volume(files, part)
            if raw.modality not in ("MR", "unknown"):
                raise ImageError(
                    "no_domain",
                    f"modality {_safe(raw.modality)} in the domain mri, which takes MR; change the recipe's query",
                )
            mask = foreground(raw.array, raw.valid)
        except ImageError as err:
            raise named(err, series_id) from err
        return build_sample(raw, mask, series_id=series_id, domain=self.name, units="arbitrary")

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return the body, (X, Y, Z) bool."""
        return foreground(sample.image[0], sample.valid)


def _safe(modality: str) -> str:
    """Return a DICOM modality code, or `unknown` for free text in its place."""
    return modality if len(modality) <= 4 and modality.isalnum() and modality.isupper() else "unknown"
