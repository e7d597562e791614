"""What a domain is: one kind of image, from its files to a canonical `Sample` in physical units.

A domain computes intensity statistics and does not apply them; it does not augment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from medssl.domains.statistics import intensity_stats, rounded
from medssl.domains.volume_files import RawVolume
from medssl.errors import GeometryError, ImageError
from medssl.types import ImageMeta, Sample


@runtime_checkable
class Domain(Protocol):
    """Reads one series.

    Args:
        name: Registered name.
        version: Raised whenever `read` would give other voxels or statistics for the same file; part of the store key.
    """

    name: str
    version: int

    def params(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON-able values; part of the store key."""
        ...

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read one series.

        Args:
            files: Its files, as `Archive.files(series_id)` gives them.
            series_id: Its pseudonymous id, for messages and metadata.
            part: What of these files the series is, as `Archive.part(series_id)` gives it: `{"volume": k}` the k-th volume of
                a four-dimensional file, `{"frames": [[start, stop], ...]}` these frames of a multi-frame file (half-open, in
                slice order; as `range` takes them, so `[start, stop, step]` where they lie apart or run backwards),
                `{"member": name}` an associated image of a slide, `{"box": [x, y, width, height]}` a region of a slide in pixels of its
                finest level. None: all of it.

        Raises:
            ImageError: The series cannot be used; `reason` says why.
        """
        ...

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return the (X, Y, Z) bool foreground that statistics and foreground-biased crops refer to."""
        ...


def build_sample(raw: RawVolume, mask: np.ndarray, *, series_id: str, domain: str, units: str, flags: Sequence[str] = ()) -> Sample:
    """Put a raw volume and its foreground into a `Sample`.

    Args:
        raw: The volume.
        mask: (X, Y, Z) bool foreground.
        series_id: Pseudonymous id.
        domain: Domain name.
        units: `HU` or `arbitrary`.
        flags: Flags of the domain, added to those of the volume.
    """
    stats = rounded(intensity_stats(raw.array, mask, raw.valid))
    meta = ImageMeta(
        series_id=series_id,
        domain=domain,
        modality=raw.modality if raw.modality in ("CT", "MR") else "unknown",
        units=units,
        slice_axis=raw.slice_axis,
        stats=stats,
        flags=tuple(dict.fromkeys([*raw.flags, *flags])),
        facts=raw.facts,
    )
    return Sample(raw.array[None], raw.spacing_mm, raw.affine, raw.valid, meta)


def named(err: ImageError, series_id: str) -> ImageError:
    """Return the same error with the series named in front; class and reason are kept."""
    text = f"series {series_id}: {err}"
    return GeometryError(text, err.reason) if isinstance(err, GeometryError) else ImageError(err.reason, text)
