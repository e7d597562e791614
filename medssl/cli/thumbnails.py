"""Pictures of an archive for its private page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from medssl.archive.table import Archive, SeriesRow
    from medssl.report.archive_page import Picture
    from medssl.types import Sample

MAX_BYTES = 400_000_000
"""Larger series are not opened for a picture."""
SOFT_TISSUE = (-160.0, 240.0)
"""HU."""


def draw_pictures(archive: Archive, limit: int = 24, on_progress: Callable[[int, int], None] | None = None) -> list[Picture]:
    """Return the middle slice or frame of some usable series, spread over the modalities; what cannot be read is left out.

    Args:
        archive: The index.
        limit: Pictures at most.
        on_progress: Called with (pictures drawn, pictures to draw at most).
    """
    from medssl.errors import MedsslError
    from medssl.registry import DOMAINS, lookup

    found: list[Picture] = []
    rows = spread([row for row in archive.select() if row.domain in DOMAINS and row.bytes < MAX_BYTES], 2 * limit)
    for row in rows:
        if on_progress is not None:
            on_progress(len(found), min(limit, len(rows)))
        if len(found) == limit:
            break
        try:
            domain = lookup("domain", row.domain)()
            sample = domain.read(archive.files(row.series_id), series_id=row.series_id, part=archive.part(row.series_id))
            picture = middle(sample, f"{row.modality}, series {row.series_id[:8]}")
        except MedsslError:
            continue
        if picture is not None:
            found.append(picture)
    return found


def spread(rows: list[SeriesRow], limit: int) -> list[SeriesRow]:
    """Return at most `limit` rows: the first of every modality and patient, then the second of each, and so on.

    Later volumes of one series look like the first, so they come last.
    """
    groups: dict[tuple[str, str], list[SeriesRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.modality, row.volume_index, row.series_id)):
        groups[row.modality, row.patient_id].append(row)
    deepest = max((len(group) for group in groups.values()), default=0)
    order = [group[k] for k in range(deepest) for group in groups.values() if k < len(group)]
    return order[:limit]


def middle(sample: Sample, caption: str) -> Picture | None:
    """Return the middle slice of a volume the radiological way up, an image, or the middle frame of a clip."""
    from medssl.report.archive_page import Picture
    from medssl.report.figures import upright

    if sample.affine is not None:  # (C, X, Y, Z)
        axis = 2 if sample.meta.slice_axis is None else sample.meta.slice_axis
        volume = sample.image[0]
        plane = upright(np.take(volume, volume.shape[axis] // 2, axis=axis))
        across, down = (k for k in range(3) if k != axis)
        spacing = sample.spacing_mm
        window = SOFT_TISSUE if sample.meta.units == "HU" else None
        return Picture(plane, spacing[down] / spacing[across] if spacing else 1.0, caption, window)
    if sample.image.ndim == 4:  # (T, C, H, W)
        frame = sample.image[sample.image.shape[0] // 2]
    elif sample.image.ndim == 3:  # (C, H, W)
        frame = sample.image
    else:
        return None
    plane = np.moveaxis(frame[:3], 0, -1) if frame.shape[0] >= 3 and frame.dtype == np.uint8 else frame[0]
    window = (0.0, 255.0) if plane.dtype == np.uint8 else None  # made to be looked at as it is
    return Picture(plane, sample.spacing_mm[0] / sample.spacing_mm[1] if sample.spacing_mm else 1.0, caption, window)
